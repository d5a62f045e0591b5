"""Hugging Face model directory -> Megatron checkpoint directory.

Takes the families of model_files/families.py: Qwen3, Qwen3-MoE, Qwen2 and Qwen2.5, Llama and what
has its architecture, each plain or as a block-diffusion model (``sdar``, ``a2d-...``: SDAR and
TraDo, dllm and the paper's models, our own exports). The checkpoint can be read at any tensor,
pipeline and expert parallelism.
"""

from pathlib import Path

from checkpoint_tools.arguments import DTYPES, add_quiet, start
from checkpoint_tools.export.hf_files import plain_config
from checkpoint_tools.export.mask_registration import register_mask
from checkpoint_tools.mask_choice import choose_mask
from checkpoint_tools.streaming.team import Team, shared_directory
from megatron_opdlm.errors import Arguments, command
from megatron_opdlm.model_files.families import BY_TYPE
from megatron_opdlm.model_files.huggingface_files import ADDED, carry_over, read_contract
from megatron_opdlm.model_files.manifest import HUGGINGFACE, WEIGHTS, BlockContract, write_manifest
from megatron_opdlm.model_files.safetensors_dir import HFWeights, open_weights
from megatron_opdlm.model_files.shape import read_json, read_shape
from megatron_opdlm.model_files.vocabulary import end_tokens, names_end_token, pad_token
from megatron_opdlm.model_files.writing import check_free, check_outside, write_json
from megatron_opdlm.reporting.progress import BYTES, Progress


def main() -> None:
    """Check everything that can be checked before torch is imported, then convert."""
    arguments = _parser().parse_args()
    team = start("import_hf")
    check_free(arguments.out)
    shape = read_shape(arguments.hf)
    check_outside(arguments.out, "--out", {"--hf": arguments.hf})
    with open_weights(arguments.hf, shape) as weights:
        mask = choose_mask(
            arguments.hf,
            token_id=arguments.mask_token_id,
            text=arguments.mask_token,
            add=arguments.add_mask_token,
        )
        contract = read_contract(read_json(arguments.hf / "config.json"), mask.id)
        ends = names_end_token(arguments.hf)
        if ends:
            end_tokens(arguments.hf)
            pad_token(arguments.hf)
        weights.check_tied_head()
        dtype = arguments.dtype or weights.stored_dtype()
        convert(
            _grown(weights) if mask.added else weights,
            arguments.out,
            contract,
            dtype,
            mask_text=mask.text,
            team=team,
            quiet=arguments.quiet,
        )
    if not team.is_first:
        return
    size = f"{shape.parameters:,} parameters, {shape.layers} layers, {dtype}"
    facts = [size, f"mask token {mask.id}" + ", a new row" * mask.added]
    if mask.id is None:
        facts[-1] = "no mask token yet: training needs model.mask_token_id"
    if not ends:
        facts.append("no end token: decoding needs eos_token_id in generation_config.json")
    print(f"imported {arguments.hf} ({', '.join(facts)}) into {arguments.out}")


def convert(
    weights: HFWeights,
    out: Path,
    contract: BlockContract,
    dtype: str,
    *,
    mask_text: str | None = None,
    team: Team = Team(),  # noqa: B008 -- frozen
    quiet: bool = True,
) -> None:
    """Write the checkpoint directory ``out`` whole or not at all, all processes of ``team``
    together. ``mask_text``: the mask token's, where the tokenizer has to learn it.
    """
    from checkpoint_tools.streaming.megatron_weights import DTYPES as TORCH_DTYPES
    from checkpoint_tools.streaming.weight_writer import write_weights

    torch_dtype = TORCH_DTYPES[dtype]
    team.join()
    with shared_directory(out, team) as directory:
        files = directory / HUGGINGFACE
        team.on_first(lambda: _carry_over(weights, files, contract, mask_text))
        total = weights.model_shape.parameters * torch_dtype.itemsize // team.size
        shown = team.is_first and not quiet
        with Progress(f"import {out.name}", total, show=shown, unit=BYTES) as bar:
            sha256 = write_weights(directory / WEIGHTS, weights, torch_dtype, team, bar)
        known = {f"weights/{name}": digest for name, digest in sha256.items()}
        team.on_first(
            lambda: write_manifest(
                directory, kind="model", dtype=dtype, block_contract=contract, sha256=known
            )
        )


def _grown(weights: HFWeights) -> HFWeights:
    from checkpoint_tools.streaming.grown_weights import GrownWeights

    return GrownWeights.of(weights)


def _carry_over(
    weights: HFWeights, target: Path, contract: BlockContract, mask_text: str | None
) -> None:
    """Copy what is no weights; the configuration becomes the family's own, with the mask token."""
    carry_over(weights.directory, target)
    written = read_json(target / "config.json")
    config = plain_config(written) | {"vocab_size": weights.model_shape.vocab_size}
    if contract.mask_token_id is not None:
        config["mask_token_id"] = contract.mask_token_id
    if weights.added_rows or written.get(ADDED):
        config[ADDED] = True
    write_json(target / "config.json", config)
    if mask_text is not None:
        assert contract.mask_token_id is not None
        register_mask(target, contract.mask_token_id, mask_text)


def _parser() -> Arguments:
    parser = Arguments(description=__doc__)
    parser.add_argument(
        "--hf",
        type=Path,
        required=True,
        help=f"Hugging Face directory of model_type {', '.join(BY_TYPE)}",
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory to make")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: as stored)")
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument(
        "--mask-token-id",
        type=int,
        metavar="N",
        help="a row that is no token, where the tokenizer has no mask and 151669 does not fit",
    )
    mask.add_argument(
        "--mask-token",
        metavar="TEXT",
        help='a token of the tokenizer that no text uses, e.g. "<|reserved_special_token_0|>"',
    )
    mask.add_argument(
        "--add-mask-token",
        action="store_true",
        help="one more row, the mean of the others, where every row is a token that is used",
    )
    add_quiet(parser)
    return parser


if __name__ == "__main__":
    command(main)
