"""Megatron checkpoint directory (imported or from training) -> Hugging Face directory.

``sdar`` is what serving engines load (untied, with their settings beside the weights); it and
``a2d-...`` ship their own code, with ``generate`` for block diffusion; ``qwen3``, ``qwen2`` and
``llama`` are the plain autoregressive layouts with the block contract noted in config.json. The
tokenizer of all knows the mask token, and a model card says what the checkpoint records. An export
gets its name after it has been compared with the checkpoint (see verify): every tensor as it is
written, then logits and a sample of greedy tokens, or all that ``verify`` compares.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from checkpoint_tools.arguments import DTYPES, add_quiet, start
from checkpoint_tools.comparisons import FULL, SAMPLE, Extent, compare_tensor
from checkpoint_tools.export.export_files import CardFacts, write_files
from checkpoint_tools.export.formats import exported_shape, with_explicit_head
from checkpoint_tools.export.hf_files import DEFAULT_BLOCK_SIZE
from checkpoint_tools.export.model_card import read_evaluation
from checkpoint_tools.export.safetensors_writer import DEFAULT_SHARD_BYTES, ShardWriter
from checkpoint_tools.quantization.export import (
    DEFAULT_CALIBRATION,
    DEFAULT_HELD_OUT,
    KINDS,
    Quantization,
    quantize,
    read_quantization,
)
from checkpoint_tools.streaming.team import Team, shared_directory
from checkpoint_tools.verify import compare
from megatron_opdlm import written_values
from megatron_opdlm.errors import Arguments, InputError, command
from megatron_opdlm.model_files.families import FORMATS
from megatron_opdlm.model_files.formats import check_format, layout_of
from megatron_opdlm.model_files.manifest import HUGGINGFACE, Manifest, check_contents, read_manifest
from megatron_opdlm.model_files.safetensors_dir import HFWeights, open_weights
from megatron_opdlm.model_files.shape import ModelShape, hf_names, read_shape
from megatron_opdlm.model_files.writing import check_free, check_outside
from megatron_opdlm.reporting.progress import BYTES, Progress, say

ITEM_BYTES = {"fp32": 4, "bf16": 2}
EXTENTS = {"sample": SAMPLE, "full": FULL}


def main() -> None:
    """Check arguments and files before torch is imported, then convert."""
    arguments = _parser().parse_args()
    team = start("export_hf")
    check_free(arguments.out)
    check_outside(arguments.out, "--out", {"--checkpoint": arguments.checkpoint})
    try:
        written_values.one_line(arguments.base_model)
    except ValueError as error:
        raise InputError(f"--base-model {arguments.base_model!r:.80} {error}") from error
    if arguments.shard_bytes < 1:
        raise InputError(f"--shard-bytes {arguments.shard_bytes}: a number of bytes; use 1 or more")
    manifest = read_manifest(arguments.checkpoint)
    shape = read_shape(arguments.checkpoint / HUGGINGFACE)
    check_format(arguments.format, manifest.block_contract, shape)
    evaluation = read_evaluation(arguments.evaluation)
    dtype = arguments.dtype or manifest.dtype
    if arguments.quantize and team.size > 1:
        raise InputError(
            f"--quantize {arguments.quantize} was started with {team.size} ranks; start it once, "
            "without torchrun"
        )
    quantization = read_quantization(
        arguments.quantize,
        arguments.checkpoint,
        shape,
        manifest.block_contract,
        calibration=arguments.calibration,
        calibration_samples=arguments.calibration_samples,
        held_out_samples=arguments.held_out_samples,
        max_kl=arguments.max_kl,
    )
    convert(
        arguments.checkpoint,
        arguments.out,
        manifest,
        shape,
        model_format=arguments.format,
        dtype=dtype,
        shard_bytes=arguments.shard_bytes,
        card=CardFacts(base_model=arguments.base_model, evaluation=evaluation),
        quantization=quantization,
        extent=EXTENTS[arguments.verify],
        team=team,
        quiet=arguments.quiet,
    )
    if not team.is_first:
        return
    note = ""
    if manifest.block_contract.block_size is None:
        note = f"; it was never trained, so it notes block size {DEFAULT_BLOCK_SIZE}"
    name = f"{arguments.format} ({arguments.quantize or dtype})"
    print(f"exported {arguments.checkpoint} as {name} to {arguments.out}{note}")


def convert(
    checkpoint: Path,
    out: Path,
    manifest: Manifest,
    shape: ModelShape,
    *,
    model_format: str,
    dtype: str,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    card: CardFacts = CardFacts(),  # noqa: B008 -- frozen
    quantization: Quantization | None = None,
    extent: Extent = SAMPLE,
    team: Team = Team(),  # noqa: B008 -- frozen
    quiet: bool = True,
) -> None:
    """Write the Hugging Face directory ``out`` whole or not at all, all processes of ``team``
    together. It returns on the others while the first one compares the export with the checkpoint.

    With ``quantization`` by one process alone, which then prints what the quantised model loses.
    """
    layout = layout_of(model_format, shape.family)
    exported = exported_shape(shape, layout)
    team.join()
    with shared_directory(out, team) as directory:
        large = team.together(lambda: _check_small_files(checkpoint, manifest, team))
        team.on_first(
            lambda: write_files(
                directory,
                checkpoint,
                manifest.block_contract,
                exported,
                layout=layout,
                dtype=dtype,
                card=replace(card, quantized=quantization is not None),
            )
        )
        if quantization is not None:
            team.together(lambda: check_contents(checkpoint, manifest, large))
            models = directory, checkpoint, manifest.block_contract, shape, exported
            loss = quantize(
                *models, quantization, dtype=dtype, shard_bytes=shard_bytes, quiet=quiet
            )
            print(f"quantised {loss}", flush=True)
        else:
            writer = ShardWriter(directory, exported, dtype, shard_bytes)
            team.on_first(writer.create_files)
            total = exported.parameters * ITEM_BYTES[dtype]
            with Progress(
                f"export {out.name}",
                total // team.size,
                show=team.is_first and not quiet,
                unit=BYTES,
            ) as bar:
                team.together(
                    lambda: _while_checking(
                        lambda: _write(checkpoint, shape, writer, team, bar),
                        lambda name: check_contents(checkpoint, manifest, [name]),
                        large,
                    )
                )
        team.disband()
        if team.is_first:  # an export that differs gets no name
            if quantization is None:
                count = len(hf_names(exported))
                print(f"verified weights: {count} tensors read back equal bit for bit in {dtype}")
            for result in compare(
                directory, checkpoint, manifest, extent, name=out.name, quiet=quiet
            ):
                say(f"verified {result}")


def _check_small_files(checkpoint: Path, manifest: Manifest, team: Team) -> list[str]:
    """Check all files but those of tensors; names of those with weights, this process's share.
    Raises InputError where a checksum is another than when the file was written.
    """
    from checkpoint_tools.streaming.megatron_weights import weight_files

    small = [name for name in manifest.sha256 if not name.endswith(".distcp")]
    check_contents(checkpoint, manifest, small)  # the index says in which files weights are
    large = sorted(set(weight_files(checkpoint)) & set(manifest.sha256))
    return [large[number] for number in team.share([manifest.files[name] for name in large])]


def _while_checking(
    work: Callable[[], None], check: Callable[[str], object], names: Sequence[str]
) -> None:
    """Do ``work`` while threads check the files that it reads; a failed check is what is raised,
    whatever it made of the work.
    """
    from checkpoint_tools.streaming.weight_writer import THREADS

    with ThreadPoolExecutor(THREADS) as pool:
        checks = [pool.submit(check, name) for name in names]
        try:
            work()
        finally:
            for done in checks:
                done.result()


def _write(
    checkpoint: Path,
    shape: ModelShape,
    writer: ShardWriter,
    team: Team,
    progress: Progress,
) -> None:
    """Write this process's share of the tensors in threads, and read each back where the file's own
    header says that it lies. Raises RunError where it is another than the checkpoint's.
    """
    from checkpoint_tools.streaming.megatron_weights import read_weights
    from checkpoint_tools.streaming.weight_writer import THREADS
    from megatron_opdlm.model_files.names import hf_parts, megatron_names, sources

    get = with_explicit_head(read_weights(checkpoint, shape), shape)
    exported, written = writer.shape, open_weights(writer.directory, writer.shape)
    names, sizes = megatron_names(exported), hf_names(exported)
    costs = [sum(math.prod(sizes[s]) for s in sources(name, exported)) for name in names]

    def write(name: str) -> None:
        for part, tensor in hf_parts(name, exported, get(name)):
            size = writer.write(part, tensor)
            # Opened anew: a mapping from before this write need not show it.
            with HFWeights(written.directory, exported, written.entries) as now:
                compare_tensor(now, part, tensor, writer.dtype, checkpoint)
            progress.advance(count=size)

    with ThreadPoolExecutor(THREADS) as pool:
        parts = [pool.submit(write, names[number]) for number in team.share(costs)]
        try:
            for done in parts:
                done.result()
        finally:
            for left in parts:
                left.cancel()
    writer.close()


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="Megatron checkpoint directory"
    )
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to make")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        default=[],
        metavar="SUMMARY.json",
        help="results of evaluation.run for the model card",
    )
    parser.add_argument("--base-model", default="", help="its name, for the model card")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as stored)")
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=DEFAULT_SHARD_BYTES,
        help="largest safetensors file, in bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--verify",
        choices=EXTENTS,
        default="sample",
        help="what is compared beside the tensors: logits and tokens of one block, or all that "
        "verify compares (default: %(default)s)",
    )
    _add_quantization(parser)
    add_quiet(parser)
    return parser


def _add_quantization(parser: Arguments) -> None:
    flags = parser.add_argument_group("quantisation")
    flags.add_argument(
        "--quantize", choices=KINDS, help="linears of the layers in FP8, through ModelOpt"
    )
    flags.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE.jsonl",
        help="rollouts of this model: samples.jsonl of its training, or the output of "
        "evaluation.sample",
    )
    flags.add_argument(
        "--calibration-samples",
        type=int,
        metavar="N",
        help=f"calibrate on the first N rollouts (default: {DEFAULT_CALIBRATION})",
    )
    flags.add_argument(
        "--held-out-samples",
        type=int,
        metavar="N",
        help="compare with the unquantised model on the last N rollouts, at most a quarter "
        f"(default: {DEFAULT_HELD_OUT})",
    )
    flags.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="export nothing where the mean KL at masked positions is larger",
    )


if __name__ == "__main__":
    command(main)
