"""Hugging Face Qwen3 directory -> Megatron checkpoint directory.

Takes ``qwen3``, ``qwen3_moe``, ``a2d-qwen3``, ``sdar`` and ``sdar_moe`` directories (Qwen3,
Qwen3-MoE, dllm and the paper's models, SDAR and TraDo, our own exports). The checkpoint can be read
at any tensor, pipeline and expert parallelism.
"""

from pathlib import Path

from checkpoint_tools.arguments import DTYPES, add_quiet, start
from checkpoint_tools.export.hf_files import plain_config
from checkpoint_tools.streaming.progress import progress_bar
from checkpoint_tools.streaming.team import Team, shared_directory
from megatron_opdlm.errors import Arguments, command
from megatron_opdlm.model_files.huggingface_files import carry_over, read_contract
from megatron_opdlm.model_files.manifest import HUGGINGFACE, WEIGHTS, BlockContract, write_manifest
from megatron_opdlm.model_files.safetensors_dir import HFWeights, open_weights
from megatron_opdlm.model_files.shape import read_json, read_shape
from megatron_opdlm.model_files.vocabulary import (
    end_tokens,
    known_mask_token,
    names_end_token,
    pad_token,
)
from megatron_opdlm.model_files.writing import check_free, write_json


def main() -> None:
    """Check everything that can be checked before torch is imported, then convert."""
    arguments = _parser().parse_args()
    team = start("import_hf")
    check_free(arguments.out)
    shape = read_shape(arguments.hf)
    with open_weights(arguments.hf, shape) as weights:
        config = read_json(arguments.hf / "config.json")
        contract = read_contract(config, known_mask_token(arguments.hf, arguments.mask_token_id))
        ends = names_end_token(arguments.hf)
        if ends:
            end_tokens(arguments.hf)
            pad_token(arguments.hf)
        weights.check_tied_head()
        dtype = arguments.dtype or weights.stored_dtype()
        convert(weights, arguments.out, contract, dtype, team=team, quiet=arguments.quiet)
    if not team.is_first:
        return
    size = f"{shape.parameters:,} parameters, {shape.layers} layers, {dtype}"
    mask = f"mask token {contract.mask_token_id}"
    if contract.mask_token_id is None:
        mask = "no mask token yet: training needs model.mask_token_id"
    facts = [size, mask]
    if not ends:
        facts.append("no end token: decoding needs eos_token_id in generation_config.json")
    print(f"imported {arguments.hf} ({', '.join(facts)}) into {arguments.out}")


def convert(
    weights: HFWeights,
    out: Path,
    contract: BlockContract,
    dtype: str,
    *,
    team: Team = Team(),  # noqa: B008 -- frozen
    quiet: bool = True,
) -> None:
    """Write the checkpoint directory ``out`` whole or not at all, all processes of ``team``
    together.
    """
    from checkpoint_tools.streaming.megatron_weights import DTYPES as TORCH_DTYPES
    from checkpoint_tools.streaming.weight_writer import write_weights

    torch_dtype = TORCH_DTYPES[dtype]
    team.join()
    with shared_directory(out, team) as directory:
        team.on_first(lambda: _carry_over(weights.directory, directory / HUGGINGFACE, contract))
        total = weights.model_shape.parameters * torch_dtype.itemsize // team.size
        with progress_bar(f"import {out.name}", total, shown=team.is_first and not quiet) as bar:
            sha256 = write_weights(directory / WEIGHTS, weights, torch_dtype, team, bar)
        known = {f"weights/{name}": digest for name, digest in sha256.items()}
        team.on_first(
            lambda: write_manifest(
                directory, kind="model", dtype=dtype, block_contract=contract, sha256=known
            )
        )


def _carry_over(source: Path, target: Path, contract: BlockContract) -> None:
    """Copy what is no weights; the configuration becomes Qwen3's own, with the mask token."""
    carry_over(source, target)
    config = plain_config(read_json(target / "config.json"))
    if contract.mask_token_id is not None:
        config["mask_token_id"] = contract.mask_token_id
    write_json(target / "config.json", config)


def _parser() -> Arguments:
    parser = Arguments(prog="python -m checkpoint_tools.import_hf", description=__doc__)
    parser.add_argument(
        "--hf",
        type=Path,
        required=True,
        help="Hugging Face directory: qwen3, qwen3_moe, a2d-qwen3, sdar or sdar_moe",
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to make")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as stored)")
    parser.add_argument(
        "--mask-token-id",
        type=int,
        help="id of the mask token, where the tokenizer has none and 151669 does not fit",
    )
    add_quiet(parser)
    return parser


if __name__ == "__main__":
    command(main)
