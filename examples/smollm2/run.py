"""A real language model on two cores: SmolLM2-135M-Instruct becomes a block-diffusion model.

Fetches the model, imports it, lets it answer questions of GSM8K, warms the student up on these
answers, distils on the student's own, exports, evaluates and writes report.md. A stage whose output
is there is skipped and a killed one goes on: give the same command again. key=value are keys of
warm_up.yaml and recipe.yaml in examples/smollm2, and hold for both.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.stages import Stage, Stages, checkpoints, python, torchrun
from megatron_opdlm.config import load_config
from megatron_opdlm.errors import STOPPED, Arguments, InputError, Stopped, command
from megatron_opdlm.model_files.shape import read_json
from megatron_opdlm.model_files.writing import new_directory, write_json, write_jsonl

HERE = Path(__file__).parent
WARM_UP, RECIPE = HERE / "warm_up.yaml", HERE / "recipe.yaml"
FORMATS = {False: "a2d-llama", True: "llama"}  # by loss.logit_shift, which a2d's readers lack
THRESHOLD = "0.9"
TRAININGS = ("warm_up", "distil")
TEXTS_ONLY = ("before", "warm_up", "sequential")  # not asked GSM8K
QUICK = ("--dtype", "bf16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line, checked."""

    out: Path
    ranks: int
    problems: int  # of the evaluation
    max_new_tokens: int  # response tokens of samples and evaluation
    overrides: list[str]

    @property
    def answer_tokens(self) -> int:
        """Of the model's own answers, which the warm-up cuts off there anyhow."""
        return load_config(WARM_UP, self.overrides).rollout.max_new_tokens

    @property
    def decodings(self) -> dict[str, tuple[Path, list[str]]]:
        """Name -> model and flags of everything that is compared."""
        imported, exported = self.out / "imported", self.out / "exported"
        block = load_config(RECIPE, self.overrides).rollout.block_size
        blocks = ["--block-size", str(block), "--denoising-steps", str(block)]
        static = [*blocks, "--remasking", "low_confidence_static"]
        sequential = [*blocks, "--remasking", "sequential"]
        dynamic = [*blocks, "--remasking", "low_confidence_dynamic", "--threshold", THRESHOLD]
        return {
            "teacher": (imported, ["--mode", "ar"]),
            "before": (imported, static),
            "warm_up": (_trained(self.out, "warm_up"), static),
            "static": (exported, static),
            "sequential": (exported, sequential),
            "dynamic": (exported, dynamic),
        }


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/smollm2"), help="default: %(default)s"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--problems", type=int, default=100, help="of GSM8K's tests (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="an answer (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if min(args.ranks, args.problems, args.max_new_tokens) < 1:
        raise InputError("--ranks, --problems and --max-new-tokens are positive numbers")
    settings = Settings(**(vars(args) | {"out": args.out.resolve()}))
    settings.out.mkdir(parents=True, exist_ok=True)
    runner = Stages(logs=settings.out / "logs")
    write_questions(settings.out / "data")
    for stage in stages(settings):
        if stage.complete():
            print(f"=== {stage.name}: complete, skipped", flush=True)
            continue
        with runner.stage(stage.name, stage.name):
            process = runner.start(stage.name, stage.command(), on_terminal=stage.name in TRAININGS)
            code = process.wait()
            if code == STOPPED:
                raise Stopped("training was asked to stop and has saved; the same command goes on")
            if code:
                raise runner.failure(stage.name, code)
            stage.finish()
    print((settings.out / "report.md").read_text())


def write_questions(directory: Path) -> None:
    """The questions that this example carries, as training and evaluation read them."""
    if directory.exists():
        return
    with gzip.open(HERE / "questions.json.gz", "rt", encoding="utf-8") as file:
        questions = json.load(file)
    with new_directory(directory) as new:
        for name in ("train", "held_out"):
            write_jsonl(new / f"{name}.jsonl", [{"question": text} for text in questions[name]])
        (new / "GSM8K.json").write_text(json.dumps(questions["test"]), encoding="utf-8")


def stages(settings: Settings) -> Iterator[Stage]:
    """Every stage with what tells that its output is whole."""
    out, overrides = settings.out, settings.overrides
    model, imported, exported = (out / n for n in ("model", "imported", "exported"))
    questions, answers = out / "data" / "train.jsonl", out / "own_answers.jsonl"
    fetched = ("--packages", str(out / "packages"), "--out", str(model))
    yield Stage(
        name="fetch",
        complete=model.exists,
        command=lambda: python("examples.smollm2.fetch", *fetched),
    )
    given = ("--hf", str(model), "--out", str(imported), "--add-mask-token")
    yield Stage(
        name="import",
        complete=imported.exists,
        command=lambda: python("checkpoint_tools.import_hf", *given),
    )
    asked = ("--model", str(imported), "--prompts", str(questions), "--out", str(answers))
    limit = ("--max-new-tokens", str(settings.answer_tokens), "--keep-truncated", *QUICK)
    yield Stage(
        name="answer",
        complete=answers.exists,
        command=lambda: torchrun(settings.ranks, "evaluation.answer", *asked, *limit),
    )
    yield _training(settings, "warm_up", WARM_UP, lambda: imported, answers)
    yield _training(settings, "distil", RECIPE, lambda: _trained(out, "warm_up"), answers)
    shift = load_config(RECIPE, overrides).loss.logit_shift

    def export() -> list[str]:
        given = ("--checkpoint", str(_trained(out, "distil")), "--out", str(exported))
        return python("checkpoint_tools.export_hf", *given, "--format", FORMATS[shift])

    yield Stage(name="export", complete=exported.exists, command=export)
    yield from _answers(settings)
    yield from _held_out(settings)
    yield Stage(
        name="report",
        complete=lambda: False,  # seconds; it shows what is there
        command=lambda: python("examples.smollm2.report", str(out)),
    )


def _training(
    settings: Settings, name: str, recipe: Path, start: Callable[[], Path], data: Path
) -> Stage:
    """A training from one checkpoint to another; the teacher is the imported model."""
    run, done = settings.out / name, settings.out / f"{name}.json"

    def training() -> list[str]:
        paths = (
            f"model.path={start()}",
            f"teacher.path={settings.out / 'imported'}",
            f"data.path={data}",
            f"train.out={run}",
        )
        given = ("--config", str(recipe), *paths, *settings.overrides)
        return torchrun(settings.ranks, "megatron_opdlm.train", *given)

    return Stage(
        name=name,
        complete=done.exists,
        command=training,
        finish=lambda: write_json(done, {"checkpoint": checkpoints(run)[-1].name}),
    )


def _trained(out: Path, name: str) -> Path:
    """The last checkpoint of a finished training."""
    return out / name / "checkpoints" / read_json(out / f"{name}.json")["checkpoint"]


def _held_out(settings: Settings) -> Iterator[Stage]:
    """KL on the teacher's answers, before, between and after the trainings."""
    out, imported = settings.out, settings.out / "imported"
    shift = load_config(RECIPE, settings.overrides).loss.logit_shift
    answers = out / "answers" / "teacher.jsonl"
    common = ("--teacher", str(imported), "--answers", str(answers), f"loss.logit_shift={shift}")
    for name in ("before", *TRAININGS):
        file = out / "kl" / f"{name}.json"

        def command(name: str = name, file: Path = file) -> list[str]:
            student = imported if name == "before" else _trained(out, name)
            given = ("--student", str(student), "--out", str(file))
            return python("examples.smollm2.held_out", *given, *common)

        yield Stage(name=f"kl-{name}", complete=file.exists, command=command)


def _answers(settings: Settings) -> Iterator[Stage]:
    """Answers to the held-out questions, and to GSM8K's tests, by every model and decoding."""
    out, limit = settings.out, ("--max-new-tokens", str(settings.max_new_tokens))
    for name, (model, flags) in settings.decodings.items():
        common = ("--model", str(model), *flags, *limit, *QUICK)
        texts, scores = out / "answers" / f"{name}.jsonl", out / "evaluation" / name
        asked = ("--prompts", f"{out}/data/held_out.jsonl", "--out", str(texts))
        yield Stage(
            name=f"answers-{name}",
            complete=texts.exists,
            command=lambda c=common, a=asked: torchrun(settings.ranks, "evaluation.sample", *c, *a),
        )
        if name in TEXTS_ONLY:
            continue
        graded = ("--tasks", "GSM8K", "--data", f"{out}/data", "--out", str(scores))
        first = ("--limit", str(settings.problems))
        yield Stage(
            name=f"evaluate-{name}",
            complete=(scores / "summary.json").exists,
            command=lambda c=common, g=graded, f=first: torchrun(
                settings.ranks, "evaluation.run", *c, *g, *f
            ),
        )


if __name__ == "__main__":
    command(main)
