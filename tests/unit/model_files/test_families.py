"""Claims: the family table names the tensors that transformers' classes have, tied and untied;
published configurations make published numbers of parameters; frequencies of stretched contexts are
transformers'; an export's description says of them what it was read from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_opdlm.errors import InputError
from megatron_opdlm.model.rotary import frequencies, score_scale
from megatron_opdlm.model_files.families import BY_TYPE, FAMILIES, FORMATS, LAYOUTS
from megatron_opdlm.model_files.formats import check_format
from megatron_opdlm.model_files.manifest import BlockContract
from megatron_opdlm.model_files.rotary import read_scaling
from megatron_opdlm.model_files.shape import hf_names, read_shape
from megatron_opdlm.planning.public_shapes import SHAPES

SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "sliding_window": None,
}
DENSE = [name for name in (*(f.plain.model_type for f in FAMILIES), "mistral") if "moe" not in name]


@pytest.mark.parametrize("model_type", DENSE)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tensors_are_those_of_transformers(tmp_path: Path, model_type: str, tied: bool) -> None:
    """Claim: names, sizes (the head's included, where config.json leaves it out) and all. Experts
    are stored one by one and joined in transformers 5: tests/parity/test_export.py has them."""
    keys = {"model_type": model_type, "tie_word_embeddings": tied, **SIZES}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert hf_names(read_shape(tmp_path)) == expected


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2.5-0.5B", 494_032_768),
        ("Qwen2.5-7B", 7_615_616_512),
        ("Llama-3.2-1B", 1_235_814_400),
        ("SmolLM2-135M", 134_515_008),
    ],
)
def test_parameters_of_published_models(name: str, parameters: int) -> None:
    assert read_shape(SHAPES / name).parameters == parameters


def test_every_format_has_its_readers() -> None:
    """Claim: the formats of the contract, each family its own; a refusal names those."""
    assert set(FORMATS) == {*("sdar", "qwen3", "qwen2", "llama"), *(f"a2d-{n}" for n in A2D)}
    assert all(BY_TYPE[name].formats[layout.format] is layout for name, layout in LAYOUTS.items())
    contract = BlockContract(mask_token_id=1)
    llama, qwen2 = (read_shape(SHAPES / name) for name in ("Llama-3.2-1B", "Qwen2.5-7B"))
    for name, shape, reason in (
        ("sdar", llama, r"norm queries and keys, .* a Llama; use --format a2d-llama or llama"),
        ("sdar", qwen2, "a Qwen2; use --format a2d-qwen2 or qwen2"),
        ("a2d-qwen3", llama, "is for other models: it is a Llama; use --format a2d-llama or llama"),
    ):
        with pytest.raises(InputError, match=reason):
            check_format(name, contract, shape)
        check_format(shape.family.block_diffusion.format, contract, shape)


A2D = ("qwen3", "qwen2", "llama")
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.5},
        {**LLAMA3, "original_max_position_embeddings": 8192},
        LLAMA3,
        {**YARN, "original_max_position_embeddings": 32768},
        {**YARN, "type": "yarn", "beta_fast": 16, "beta_slow": 2, "attention_factor": 0.7},
        {**YARN, "truncate": False, "mscale": 0.9, "mscale_all_dim": 0.5},
        {**YARN, "factor": 0.5, "original_max_position_embeddings": 4},
    ],
    ids=lambda scaling: "-".join(map(str, scaling.values())),
)
def test_stretched_contexts_are_those_of_transformers(scaling: dict[str, Any]) -> None:
    """Claim: frequencies to the last bits of float32, and the factor of rotated queries and keys;
    what an export writes means the same."""
    for head_dim, theta, positions in ((64, 500000.0, 131072), (128, 1e6, 40960)):
        keys = {"max_position_embeddings": positions, "rope_theta": theta, "head_dim": head_dim}
        config = AutoConfig.for_model("llama", **keys, rope_scaling=dict(scaling))
        kind = config.rope_parameters["rope_type"]
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        read = read_scaling({"rope_scaling": scaling}, Path("config.json"), positions)
        assert read is not None
        found = frequencies(head_dim, theta, read, torch.device("cpu"))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert score_scale(head_dim, read) == pytest.approx(factor**2 * head_dim**-0.5)
        written = {"rope_parameters": {**read.as_config(), "rope_theta": theta}}
        assert read_scaling(written, Path("config.json"), 7) == read
