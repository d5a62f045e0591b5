"""Generate and grade: evaluate one model on one or more tasks.

    torchrun ... -m evaluation.run --model HF_DIR --tasks NAME ... --data DIR --out DIR [decoding
    flags]

Writes ``predictions.jsonl`` (one row a problem: texts, token ids, commit passes, counts, verdicts)
and ``summary.json`` into --out, and prints the table. Responses are written as they end, and the
same command goes on after a kill without making them again; --tp, --pp, --ep and the number of
processes may be others then. An --out that is finished is shown; a task in it that was
skipped and can be graded now is run first. One that holds other settings, other data or another
model is refused. A response's random numbers depend on --seed, its row in the data file and its
number among the row's responses: not on --limit, --samples, the layout or the other tasks.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import (
    add_decoding_flags,
    check_model,
    decoding_from,
    loading_from,
)
from evaluation.generation.identity import recorded_settings
from evaluation.generation.predictions import Predictions, finished_rows
from evaluation.generation.task_run import TaskRun
from evaluation.jail.sandbox import use_sandbox
from evaluation.prompting import prompt_from
from evaluation.report import table
from evaluation.reporting.summary import is_waiting, skipped
from evaluation.sample import open_generator
from evaluation.sandbox_flag import add_sandbox_flag
from evaluation.tasks import Row, Task, get_task
from megatron_opdlm import launcher
from megatron_opdlm.config import EvaluationConfig
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import write_json, write_jsonl
from megatron_opdlm.records import Prompt

Tasks = list[tuple[Task, list[Row]]]


def load_tasks(names: list[str], data: Path, limit: int | None) -> Tasks:
    """The tasks with their (first ``limit``) rows.

    Every task's data is read before any model is.
    """
    tasks = [get_task(name) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError(f"--tasks {' '.join(names)}: names a task twice; name each once")
    return [(task, task.load(data)[:limit]) for task in tasks]


def load_training_tasks(section: EvaluationConfig) -> Tasks:
    """The tasks that the live student is asked; none where that is off. InputError for one that is
    unknown, has no data or cannot be graded on this machine.
    """
    if not section.every:
        return []
    use_sandbox(section.sandbox)
    try:
        tasks = load_tasks(section.tasks, Path(section.data), section.limit)
    except InputError as error:
        raise InputError(f"{error}; or train without it: evaluation.every=0") from None
    for task, rows in tasks:
        lacks = task.missing(rows)
        if lacks:
            raise InputError(f"evaluation.tasks: {task.name} cannot be graded here: {lacks}")
    return tasks


def evaluate(
    generator: Any,
    tasks: Tasks,
    decoding: Decoding,
    responses_per_prompt: int,
    settings: dict[str, Any],
    *,
    enable_thinking: bool = False,
    out: Path | None = None,
    show: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Evaluate every task: summary rows, the same on every rank, and predictions, on the writer
    only. A task that cannot be graded here is skipped; its row says why.

    ``generator``: an ``megatron_opdlm.generator.Generator``. ``settings`` describe it in the
    summary. With ``out`` everything is streamed into that directory, and what is there already is
    not done again; without, nothing is written. ``show``: how far it is. Raises InputError for an
    ``out`` with other settings, and where no prompt fits the model.
    """
    if out is not None:
        recorded = recorded_settings(
            tasks, decoding, responses_per_prompt, settings, enable_thinking
        )
        # The writer's view: another rank might look when the writer is done already.
        found = generator.share(finished(out, tasks, recorded) if generator.is_writer else None)
        if found is not None:
            return found, []
    else:
        recorded = None
    if generator.tokenizer is None:
        raise InputError(
            "the model directory has no tokenizer, text cannot be graded; add its files"
        )
    decoding = replace(decoding, logit_shift=generator.logit_shift)
    described = {
        **settings,
        **asdict(decoding),
        "responses_per_prompt": responses_per_prompt,
        "enable_thinking": enable_thinking,
    }
    # The writer grades: what its machine lacks is what counts.
    lacks: dict[str, str | None] = generator.share(
        {task.name: task.missing(rows) for task, rows in tasks} if generator.is_writer else None
    )
    asked = {
        task.name: prompts_of(task, rows, generator.tokenizer, enable_thinking=enable_thinking)
        for task, rows in tasks
        if not lacks[task.name]
    }
    _require_room(generator, [prompt for prompts in asked.values() for prompt in prompts])
    own_out = out if generator.is_writer else None
    with Predictions(own_out, recorded) as predictions:
        one = TaskRun(generator, decoding, responses_per_prompt, described, predictions, show=show)
        summaries = []
        for task, rows in tasks:
            reason = lacks[task.name]
            if reason is None:
                summaries.append(one.run(task, rows, asked[task.name]))
                continue
            summaries.append(skipped(task.name, reason, described).as_dict())
        return summaries, predictions.publish([task.name for task, _ in tasks], summaries)


def finished(out: Path, tasks: Tasks, recorded: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The summary rows of an evaluation that is done; None where something is left to do, which may
    be a task that was skipped and can be graded now. InputError where ``out`` holds anything else
    than an evaluation of these settings (``recorded_settings``).
    """
    rows = finished_rows(out, recorded)
    skipped_now = {row["task"] for row in rows or [] if is_waiting(row)}
    ready = (task.name in skipped_now and task.missing(own) is None for task, own in tasks)
    return None if any(ready) else rows


def prompts_of(
    task: Task, rows: list[Row], tokenizer: Any, *, enable_thinking: bool
) -> list[Prompt]:
    """A task's questions as token ids."""
    thinking = enable_thinking and task.may_think
    where = f"task {task.name}"
    return [
        prompt_from(i, task.prompt(row), tokenizer, where=where, enable_thinking=thinking)
        for i, row in enumerate(rows)
    ]


def tell_skipped(tasks: Tasks) -> None:
    """Say, before a model is loaded, what cannot be graded here and how to install it."""
    for task, rows in tasks:
        reason = task.missing(rows)
        if reason is not None and launcher.rank() == 0:
            print(f"evaluation: task {task.name} is skipped: {reason}", flush=True)


def _require_room(generator: Any, prompts: list[Prompt]) -> None:
    """A prompt that is too long counts as wrong, but one of them at least must fit."""
    if prompts and all(generator.room(prompt) < 1 for prompt in prompts):
        shortest = min(len(prompt.ids) for prompt in prompts)
        raise InputError(
            f"no prompt fits the model: the shortest has {shortest} tokens, the model "
            f"{generator.longest} positions; evaluate a model with more"
        )


def write_results(
    out: Path, summaries: list[dict[str, Any]], predictions: list[dict[str, Any]]
) -> None:
    """Write both files; ``summary.json`` comes last and says that the rest is there."""
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "predictions.jsonl", predictions)
    write_json(out / "summary.json", summaries)


def add_asking_flags(parser: argparse.ArgumentParser) -> None:
    """How much of the tasks is asked, and how: ``check_asking`` checks them."""
    parser.add_argument("--limit", type=int, default=None, help="first problems of each task only")
    parser.add_argument(
        "--samples",
        "--responses-per-prompt",
        dest="samples",
        type=int,
        default=1,
        metavar="K",
        help="responses to each problem; their mean accuracy counts (avg@K)",
    )
    parser.add_argument(
        "--enable-thinking",
        action="store_true",
        help="thinking flag of the chat template; HumanEval, MBPP and LCB-v6 never think",
    )


def check_asking(args: argparse.Namespace) -> None:
    """InputError for a number of problems or responses below 1."""
    if args.samples < 1:
        raise InputError(f"--samples {args.samples}: responses to each problem; use 1 or more")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit}: a number of problems; use 1 or more")


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="NAME")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    add_asking_flags(parser)
    add_decoding_flags(parser)
    add_sandbox_flag(parser)
    return parser


def main() -> None:
    args = _parser().parse_args()
    decoding, loading = decoding_from(args), loading_from(args)
    check_asking(args)
    use_sandbox(args.sandbox)
    check_model(args.model)
    tasks = load_tasks(args.tasks, args.data, args.limit)
    settings = {"model": str(args.model), "limit": args.limit, **asdict(loading)}
    thinking = args.enable_thinking
    recorded = recorded_settings(tasks, decoding, args.samples, settings, thinking)
    found = finished(args.out, tasks, recorded)
    if found is not None:
        if launcher.rank() == 0:  # there is no process group where nothing is run
            print(f"evaluation: {args.out} is finished already\n{table(found)}")
        return
    tell_skipped(tasks)
    generator = open_generator(args.model, loading)
    summaries, _ = evaluate(
        generator,
        tasks,
        decoding,
        args.samples,
        settings,
        enable_thinking=thinking,
        out=args.out,
        show=True,
    )
    if generator.is_writer:
        print(table(summaries))


if __name__ == "__main__":
    command(main)
