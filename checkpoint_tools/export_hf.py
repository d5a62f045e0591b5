"""Megatron checkpoint directory (imported or from training) -> Hugging Face directory.

``a2d-qwen3`` ships its own code, with ``generate`` for block diffusion; ``qwen3`` is the plain
autoregressive layout with the block contract noted in config.json. The tokenizer of both knows the
mask token. An export gets its name after it has been compared with the checkpoint (see verify).
"""

from pathlib import Path

from checkpoint_tools.arguments import DTYPES, start_alone
from checkpoint_tools.hf_files import (
    DEFAULT_BLOCK_SIZE,
    carry_over,
    copy_code,
    export_config,
    write_json,
)
from checkpoint_tools.manifest import Manifest, read_manifest
from checkpoint_tools.mask_registration import register_mask, write_for_transformers_4
from checkpoint_tools.publish import check_free, new_directory
from checkpoint_tools.qwen3_shape import Qwen3Shape, read_json, read_shape
from checkpoint_tools.safetensors_dir import DEFAULT_SHARD_BYTES, write_weights
from checkpoint_tools.verify import compare
from checkpoint_tools.vocabulary import forbidden_ids
from megatron_opdlm.errors import Arguments, InputError, command

FORMATS = ("sdar", "a2d-qwen3", "qwen3")
BYTES_PER_VALUE = {"fp32": 4, "bf16": 2}


def main() -> None:
    """Check arguments and files before torch is imported, then convert."""
    arguments = _parser().parse_args()
    start_alone("export_hf")
    if arguments.format == "sdar":
        raise InputError("--format sdar is not there yet; use a2d-qwen3 or qwen3")
    check_free(arguments.out)
    manifest = read_manifest(arguments.checkpoint)
    shape = read_shape(arguments.checkpoint / "huggingface")
    check_format(arguments.format, manifest)
    dtype = arguments.dtype or manifest.dtype
    convert(
        arguments.checkpoint,
        arguments.out,
        manifest,
        shape,
        model_format=arguments.format,
        dtype=dtype,
        shard_bytes=arguments.shard_bytes,
    )
    note = ""
    if manifest.block_contract.block_size is None:
        note = f"; it was never trained, so it notes block size {DEFAULT_BLOCK_SIZE}"
    name = f"{arguments.format} ({dtype})"
    print(f"exported {arguments.checkpoint} as {name} to {arguments.out}{note}")


def check_format(model_format: str, manifest: Manifest) -> None:
    """Refuse what readers of the format would decode otherwise than it was trained."""
    contract = manifest.block_contract
    if model_format != "a2d-qwen3":
        return
    if contract.mask_token_id is None:
        raise InputError(
            "--format a2d-qwen3: the checkpoint has no mask token; train it with "
            "model.mask_token_id, or import it again with --mask-token-id"
        )
    if contract.logit_shift:
        raise InputError(
            "--format a2d-qwen3: the model was trained with loss.logit_shift=true, which readers "
            "of this format do not know; use --format qwen3"
        )
    if contract.block_alignment != "absolute":
        raise InputError(
            "--format a2d-qwen3: the model was trained with "
            f"block_alignment={contract.block_alignment}, but readers of this format count blocks "
            "from position 0; use --format qwen3"
        )


def convert(
    checkpoint: Path,
    out: Path,
    manifest: Manifest,
    shape: Qwen3Shape,
    *,
    model_format: str,
    dtype: str,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write the Hugging Face directory ``out`` whole or not at all."""
    from checkpoint_tools.megatron_weights import DTYPES as TORCH_DTYPES
    from checkpoint_tools.megatron_weights import read_weights
    from checkpoint_tools.qwen3_names import hf_from_megatron

    source = checkpoint / "huggingface"
    contract = manifest.block_contract
    with new_directory(out) as directory:
        carry_over(source, directory)
        config = export_config(
            read_json(source / "config.json"),
            shape,
            contract,
            forbidden_ids(source, contract.mask_token_id),
            model_format=model_format,
            dtype=dtype,
        )
        write_json(directory / "config.json", config)
        if model_format == "a2d-qwen3":
            copy_code(directory)
        write_for_transformers_4(directory)
        if contract.mask_token_id is not None:
            register_mask(directory, contract.mask_token_id)
        get = read_weights(checkpoint, shape)
        tensors = (
            (name, tensor.to(TORCH_DTYPES[dtype])) for name, tensor in hf_from_megatron(shape, get)
        )
        write_weights(directory, shape, tensors, BYTES_PER_VALUE[dtype], shard_bytes)
        for result in compare(
            directory, checkpoint, manifest
        ):  # an export that differs gets no name
            print(f"verified {result}", flush=True)


def _parser() -> Arguments:
    parser = Arguments(prog="python -m checkpoint_tools.export_hf", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="Megatron checkpoint directory"
    )
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to make")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as stored)")
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=DEFAULT_SHARD_BYTES,
        help="largest safetensors file, in bytes (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    command(main)
