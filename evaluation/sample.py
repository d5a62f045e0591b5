"""Generate responses for a prompts file.

    torchrun ... -m evaluation.sample --model HF_DIR --prompts FILE --out FILE.jsonl [decoding
    flags]

Prompts are read as training reads them (docs/data.md): JSONL, JSON, Parquet or a directory written
by datasets; rows of ``prompt_ids``, ``messages``, ``question`` or plain ``prompt`` text. Messages
that end with the assistant's are gone on with. Each output row is the input row with
``response_ids``, ``response``, ``committed_at`` (denoising pass of each token within its block,
from 1; all 1 under --mode ar), ``forwards`` (model forwards the sample took part in), ``passes``
and ``finish_reason``; with --margins also ``margins`` (docs/evaluation.md).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from evaluation.decoding_flags import (
    Loading,
    add_decoding_flags,
    check_model,
    decoding_from,
    loading_from,
)
from evaluation.prompting import prompt_from, response_text
from megatron_opdlm.data.rows import read_rows
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.writing import check_new_file, check_outside, write_jsonl
from megatron_opdlm.prompts import what_is_asked
from megatron_opdlm.records import Trajectory
from megatron_opdlm.reporting.progress import Progress


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Every row of the prompts file, checked as far as that goes without a tokenizer."""
    rows = read_rows(path, "--prompts")
    for row in rows:
        try:
            asked = what_is_asked(row.fields)
        except InputError as error:
            raise InputError(f"{row.place}: {error}") from error
        if not asked:
            raise InputError(f"{row.place}: the prompt is empty; write some text, or leave it out")
    return [row.fields for row in rows]


def output_row(row: dict[str, Any], trajectory: Trajectory, tokenizer: Any) -> dict[str, Any]:
    margins = trajectory.margins[: trajectory.response_tokens]
    recorded = {"margins": margins} if trajectory.margins else {}
    return {
        **row,
        "response_ids": trajectory.user_ids,
        "response": response_text(tokenizer, trajectory),
        "committed_at": trajectory.committed_at[: trajectory.response_tokens],
        **recorded,
        "forwards": trajectory.forwards,
        "passes": trajectory.passes,
        "finish_reason": trajectory.finish_reason,
    }


def sample(
    generator: Any,
    rows: list[dict[str, Any]],
    decoding: Decoding,
    where: str,
    *,
    show: bool = False,
) -> list[dict[str, Any]]:
    """Generate one response a row, in input order, on every rank.

    The random key of a row is its place in the file. ``show``: how far it is.
    """
    prompts = [
        prompt_from(index, row, generator.tokenizer, where=where) for index, row in enumerate(rows)
    ]
    decoding = replace(decoding, logit_shift=generator.logit_shift)
    with Progress("sample", len(rows), 0, show=show and generator.is_writer) as progress:
        trajectories = generator.generate(
            prompts,
            decoding,
            list(range(len(rows))),
            lambda trajectory: progress.advance(trajectory.response_tokens),
        )
    return [
        output_row(row, trajectory, generator.tokenizer)
        for row, trajectory in zip(rows, trajectories, strict=True)
    ]


def open_generator(model: Path, loading: Loading) -> Any:
    """Load the model.

    Called only once every flag and file has been checked: the import brings torch.
    """
    from megatron_opdlm.generator import load_generator

    return load_generator(
        model,
        tp=loading.tp,
        pp=loading.pp,
        ep=loading.ep,
        mask_token_id=loading.mask_token_id,
        dtype=loading.dtype,
    )


def main() -> None:
    parser = Arguments(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    parser.add_argument(
        "--margins",
        action="store_true",
        help="record each token's best logit less the second best, in the pass that committed it",
    )
    add_decoding_flags(parser)
    args = parser.parse_args()
    decoding, loading = decoding_from(args), loading_from(args)
    if args.margins and decoding.temperature > 0:
        raise InputError(
            f"--margins with --temperature {decoding.temperature:g}: only the best token is chosen "
            "by its margin, a drawn one by its random number; use --temperature 0"
        )
    decoding = replace(decoding, margins=args.margins)
    check_model(args.model)
    check_outside(args.out, "--out", {"--prompts": args.prompts})
    check_new_file(args.out, "--out")
    rows = read_prompts(args.prompts)
    generator = open_generator(args.model, loading)
    results = sample(generator, rows, decoding, f"--prompts {args.prompts}", show=True)
    if generator.is_writer:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(args.out, results)
        tokens = sum(len(row["response_ids"]) for row in results)
        print(f"sample: {len(results)} responses, {tokens} tokens -> {args.out}")


if __name__ == "__main__":
    command(main)
