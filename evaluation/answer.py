"""Have a model answer the prompts of a training set: the set with a ``response`` in every row.

    torchrun ... -m evaluation.answer --model DIR --prompts FILE --out FILE.jsonl [decoding flags]

Prompts are read and rendered as training does (docs/data.md), and the responses are what
``mixing.path`` takes: of the autoregressive model itself (--mode ar, the default here) for
supervised fine-tuning on a model's own answers and for distillation on its trajectories. Answers
are kept as they end (FILE.jsonl.part), and the same command goes on after a kill, on any layout.
Those that ran into --max-new-tokens are left out unless --keep-truncated, empty ones always.
FILE.jsonl.manifest.json says by which model, from which prompts and how they were made.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import (
    add_decoding_flags,
    check_model,
    decoding_from,
    loading_from,
)
from evaluation.generation.identity import hash_model
from evaluation.sample import open_generator, response_text
from megatron_opdlm.data.checks import MANIFEST
from megatron_opdlm.data.content_hash import content_hash
from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import (
    check_new_file,
    check_outside,
    json_line,
    write_json,
    write_jsonl,
)
from megatron_opdlm.prompts import PromptSet, load_prompts
from megatron_opdlm.records import Trajectory
from megatron_opdlm.reporting.progress import Progress

_SYNC_SECONDS = 5.0  # between flushes to the disk


class Answers:
    """Answers by row, in memory and as lines of a file whose first line says how they are made.
    Lives on the writer.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Takes over what an earlier attempt has. InputError where that was made otherwise."""
        self._path, self._synced = path, time.monotonic()
        self.found: dict[int, dict[str, Any]] = {}
        lines = _whole_lines(path)
        if lines:
            differing = [key for key in settings if lines[0].get(key) != settings[key]]
            if differing:
                raise InputError(
                    f"{path}: holds answers that differ in {', '.join(differing)}; give the same "
                    "settings to go on with them, or remove it"
                )
            self.found = {line["index"]: line for line in lines[1:]}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab")
        if not lines:
            self._append(settings)

    def add(self, trajectory: Trajectory, text: str) -> None:
        """An answer has ended."""
        line = {
            "index": trajectory.prompt.index,
            "response": text,
            "tokens": trajectory.response_tokens,
            "finish_reason": trajectory.finish_reason,
        }
        self.found[trajectory.prompt.index] = line
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        self._stream.write(json_line(line))
        self._stream.flush()
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def discard(self) -> None:
        """The data file is there: the lines are not needed any more."""
        self._stream.close()
        self._path.unlink()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last one that a kill tore is cut off it."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.split(b"\n")[:-1]]
    except ValueError as error:
        raise InputError(f"{path}: no lines of evaluation.answer ({error}); remove it") from error


def answer(
    generator: Any, prompts: PromptSet, decoding: Decoding, part: Path, settings: dict[str, Any]
) -> Answers | None:
    """Every answer that ``part`` does not hold yet; all of them on the writer, None elsewhere.

    A row's random numbers depend on its place in the file and the seed, not on the layout or on
    what was answered before.
    """
    answers = Answers(part, settings) if generator.is_writer else None
    done: set[int] = generator.share(set(answers.found) if answers else None)
    left = [prompt for prompt in prompts.prompts if prompt.index not in done]
    total = len(prompts.prompts)
    with Progress("answer", total, total - len(left), show=generator.is_writer) as progress:

        def keep(trajectory: Trajectory) -> None:
            assert answers is not None
            answers.add(trajectory, response_text(generator.tokenizer, trajectory))
            progress.advance(trajectory.response_tokens)

        if left:
            indices = [prompt.index for prompt in left]
            decoding = replace(decoding, logit_shift=generator.logit_shift)
            generator.generate(left, decoding, indices, keep)
    return answers


def publish(
    source: Path, out: Path, answers: Answers, settings: dict[str, Any], skipped: int, keep: bool
) -> str:
    """The data file, its manifest, and what to say of them. ``skipped``: prompts that were too
    long; ``keep``: also answers that were cut off.
    """
    rows, left_out = [], {"prompt_too_long": skipped, "truncated": 0, "empty": 0}
    tokens = 0
    for row in read_rows(source, "--prompts"):
        found = answers.found.get(row.index)
        if found is None:
            continue
        if found["finish_reason"] == "length" and not keep:
            left_out["truncated"] += 1
        elif not found["response"].strip():
            left_out["empty"] += 1
        else:
            rows.append({**row.fields, "response": found["response"]})
            tokens += found["tokens"]
    if not rows:
        raise InputError(
            f"--prompts {source}: no answer is left: {_told(left_out)}; raise --max-new-tokens, or "
            "use --keep-truncated"
        )
    write_jsonl(out, rows)
    manifest = {
        "sha256": content_hash(out),
        **settings,
        "rows": len(rows),
        "left_out": left_out,
        "response_tokens": tokens,
    }
    write_json(out.with_name(out.name + MANIFEST), manifest)
    answers.discard()
    return f"{len(rows)} rows with {tokens} response tokens (left out: {_told(left_out)}) -> {out}"


def _told(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.items())


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument("--enable-thinking", action="store_true", help="of the chat template")
    parser.add_argument("--keep-truncated", action="store_true", help="answers that were cut off")
    add_decoding_flags(parser)
    parser.set_defaults(mode="ar")
    return parser


def main() -> None:
    args = _parser().parse_args()
    decoding, loading = decoding_from(args), loading_from(args)
    check_model(args.model)
    if args.out.suffix != ".jsonl":
        raise InputError(f"--out {args.out}: a name that ends in .jsonl is needed")
    check_outside(args.out, "--out", {"--prompts": args.prompts})
    part = args.out.with_name(args.out.name + ".part")
    if not part.exists():  # else a kill may have come between the answers and their manifest
        check_new_file(args.out, "--out")
    read_rows(args.prompts, "--prompts")  # before any model is loaded
    settings = {
        "model": str(args.model),
        "model_hash": hash_model(args.model),
        "prompts": str(args.prompts),
        "prompts_sha256": content_hash(args.prompts),
        "enable_thinking": args.enable_thinking,
        "dtype": loading.dtype,
        **decoding.asked,
    }
    generator = open_generator(args.model, loading)
    prompts = load_prompts(
        args.prompts,
        generator.tokenizer,
        enable_thinking=args.enable_thinking,
        max_prompt_tokens=generator.longest - 1,
        vocab_size=generator.vocabulary.size,
        option="--prompts",
    )
    answers = answer(generator, prompts, decoding, part, settings)
    if answers is not None:
        said = publish(
            args.prompts, args.out, answers, settings, prompts.skipped, args.keep_truncated
        )
        print(f"answer: {said}")


if __name__ == "__main__":
    command(main)
