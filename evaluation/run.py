"""Generate and grade: evaluate one model on one or more tasks.

    torchrun ... -m evaluation.run --model HF_DIR --tasks NAME ... --data DIR --out DIR [decoding
    flags]

Writes ``predictions.jsonl`` (one row a problem: texts, token ids, commit passes, counts, verdicts)
and ``summary.json`` into --out, which must be new or empty, and prints the table. Every problem's
random key is its row number, so a result does not depend on --limit, on the layout or on the other
tasks.
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import (
    add_decoding_flags,
    check_model,
    decoding_from,
    loading_from,
)
from evaluation.jsonl import check_new_directory, write_json, write_jsonl
from evaluation.prompting import prompt_from
from evaluation.report import table
from evaluation.sample import open_generator, response_text
from evaluation.score import grade_predictions, graded_row, summary_of
from evaluation.summary import SummaryRow, skipped
from evaluation.tasks import Row, Task, get_task
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.records import Trajectory


def prediction_row(task: Task, trajectories: list[Trajectory], tokenizer: Any) -> dict[str, Any]:
    """Everything that was seen of the responses to one problem. Lists hold one entry a response."""
    prompt = trajectories[0].prompt
    return {
        "task": task.name,
        "index": prompt.index,
        "prompt": tokenizer.decode(prompt.ids, skip_special_tokens=False),
        "responses": [response_text(tokenizer, trajectory) for trajectory in trajectories],
        "response_ids": [t.user_ids for t in trajectories],
        "committed_at": [t.committed_at[: t.response_tokens] for t in trajectories],
        "forwards": [t.forwards for t in trajectories],
        "passes": [t.passes for t in trajectories],
        "finish_reason": [t.finish_reason for t in trajectories],
    }


def run_task(
    generator: Any,
    task: Task,
    rows: list[Row],
    decoding: Decoding,
    responses_per_prompt: int,
    settings: dict[str, Any],
    *,
    enable_thinking: bool = False,
) -> tuple[SummaryRow, list[dict[str, Any]]]:
    """Evaluate one task: its summary row and its predictions, the same on every rank."""
    if generator.tokenizer is None:
        raise InputError(
            "the model directory has no tokenizer, text cannot be graded; add its files"
        )
    start = time.monotonic()
    tokenizer, k = generator.tokenizer, responses_per_prompt
    prompts = [
        prompt_from(
            index,
            task.prompt(row),
            tokenizer,
            where=f"task {task.name}",
            enable_thinking=enable_thinking,
        )
        for index, row in enumerate(rows)
    ]
    repeated = [prompt for prompt in prompts for _ in range(k)]
    trajectories = generator.generate(repeated, decoding, list(range(len(repeated))))
    shares = [trajectories[i * k : (i + 1) * k] for i in range(len(rows))]
    predictions = [prediction_row(task, own, tokenizer) for own in shares]
    grades = grade_predictions(task, rows, predictions)
    for own, row_grades in zip(predictions, grades, strict=True):
        own.update(graded_row(own["index"], row_grades))
    summary = summary_of(
        task,
        rows,
        predictions,
        grades,
        seconds=time.monotonic() - start,
        settings={**settings, **task.settings()},
    )
    return summary, predictions


def load_tasks(names: list[str], data: Path, limit: int | None) -> list[tuple[Task, list[Row]]]:
    """The tasks with their (first ``limit``) rows.

    Every task's data is read before any model is.
    """
    if len(set(names)) < len(names):
        raise InputError(f"--tasks {' '.join(names)}: names a task twice; name each once")
    return [(task, task.load(data)[:limit]) for task in map(get_task, names)]


def evaluate(
    generator: Any,
    tasks: list[tuple[Task, list[Row]]],
    decoding: Decoding,
    responses_per_prompt: int,
    settings: dict[str, Any],
    *,
    enable_thinking: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Evaluate every task: (summary rows, predictions). One that cannot be graded here is skipped
    and says so."""
    decoding = replace(decoding, logit_shift=generator.logit_shift)
    settings = {
        **settings,
        **asdict(decoding),
        "responses_per_prompt": responses_per_prompt,
        "enable_thinking": enable_thinking,
    }
    summaries, predictions = [], []
    for task, rows in tasks:
        lacks = task.missing(rows)
        if lacks:
            if generator.is_writer:
                print(f"evaluation: task {task.name} is skipped: {lacks}", flush=True)
            summaries.append(skipped(task.name, lacks, settings).as_dict())
            continue
        summary, task_predictions = run_task(
            generator,
            task,
            rows,
            decoding,
            responses_per_prompt,
            settings,
            enable_thinking=enable_thinking,
        )
        summaries.append(summary.as_dict())
        predictions.extend(task_predictions)
    return summaries, predictions


def write_results(
    out: Path, summaries: list[dict[str, Any]], predictions: list[dict[str, Any]]
) -> None:
    """Write both files; ``summary.json`` comes last and says that the rest is there."""
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "predictions.jsonl", predictions)
    write_json(out / "summary.json", summaries)


def main() -> None:
    parser = Arguments(
        prog="python -m evaluation.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR")
    parser.add_argument("--tasks", required=True, nargs="+", metavar="NAME")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--limit", type=int, default=None, help="first problems of each task only")
    parser.add_argument("--responses-per-prompt", type=int, default=1)
    parser.add_argument(
        "--enable-thinking", action="store_true", help="thinking flag of the chat template"
    )
    add_decoding_flags(parser)
    args = parser.parse_args()
    decoding, loading = decoding_from(args), loading_from(args)
    if args.responses_per_prompt < 1:
        raise InputError(f"--responses-per-prompt {args.responses_per_prompt}: use 1 or more")
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit}: a number of problems; use 1 or more")
    check_model(args.model)
    check_new_directory(args.out, "--out")
    tasks = load_tasks(args.tasks, args.data, args.limit)
    generator = open_generator(args.model, loading)
    settings = {"model": str(args.model), **asdict(loading)}
    summaries, predictions = evaluate(
        generator,
        tasks,
        decoding,
        args.responses_per_prompt,
        settings,
        enable_thinking=args.enable_thinking,
    )
    if generator.is_writer:
        write_results(args.out, summaries, predictions)
        print(table(summaries))


if __name__ == "__main__":
    command(main)
