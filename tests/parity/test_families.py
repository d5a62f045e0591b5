"""Law 1 for every family, on published configurations made small: what transformers computes is
what we compute; import then export gives every tensor back bit for bit, plain and as a
block-diffusion model; the exporter's own check compares what their ``generate`` and the engine
decode."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_tools import export_hf, import_hf, verify
from megatron_opdlm.model_files.manifest import BlockContract, read_manifest
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import read_shape
from megatron_opdlm.parallel import Layout
from megatron_opdlm.planning.public_shapes import SHAPES
from tests import oracle
from tests.distributed import jobs
from tests.tiny_models import make_model

MASK_ID = 64
SMALL = {  # make_model's own; what else a configuration says is kept
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("eos_token_id", "pad_token_id", "model_type", "tie_word_embeddings", "architectures"),
}
# Positions where the tests look, so that stretching shows: published contexts are far longer.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 3.0}
# Name of the published shape, further keys of config.json.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2.5-0.5B": ("Qwen2.5-0.5B", {}),
    "Qwen2.5-7B": ("Qwen2.5-7B", {}),
    "Llama-3.2-1B": ("Llama-3.2-1B", {}),
    "SmolLM2-135M": ("SmolLM2-135M", {}),
    "Qwen3-8B with YaRN": ("Qwen3-8B", {"rope_scaling": YARN}),
    "Llama, linear and untied": (
        "Llama-3.2-1B",
        {"rope_scaling": LINEAR, "tie_word_embeddings": False, "head_dim": None},
    ),
    "Mistral": (
        "Llama-3.2-1B",
        {"model_type": "mistral", "rope_scaling": None, "sliding_window": None},
    ),
}
IDS = [[*range(0, 44, 3)], [7], [*range(40)]]


def make_case(root: Path, name: str) -> Path:
    """A random model whose config.json is the published one but for its sizes."""
    shape, changes = CASES[name]
    published = json.loads((SHAPES / shape / "config.json").read_text()) | changes
    kept = {key: value for key, value in published.items() if key not in SMALL}
    kept.setdefault("head_dim", None)  # hidden size / heads
    if (kept.get("rope_scaling") or {}).get("rope_type") == "llama3":
        kept["rope_scaling"] = kept["rope_scaling"] | {"original_max_position_embeddings": 16}
    tied = published["tie_word_embeddings"]
    return make_model(root, published["model_type"], tied=tied, seed=4, layers=2, **kept)


@pytest.fixture(scope="module", params=CASES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_case(tmp_path_factory.mktemp("family") / "source", request.param)


@torch.no_grad()
def test_a_family(source: Path) -> None:
    """Claim: causal logits from the directory and from its import; the round trip; transformers
    reads the plain export as the very same model, the other one by its own code."""
    checkpoint, shape = source.with_name("checkpoint"), read_shape(source)
    with open_weights(source) as weights:
        contract = BlockContract(mask_token_id=MASK_ID, block_size=4)
        import_hf.convert(weights, checkpoint, contract, "fp32")
        stored = {name: weights.get(name).clone() for name in weights.names()}
    model = oracle.load(source)
    expected = torch.cat([oracle.causal_logits(model, ids) for ids in IDS])
    for directory in (source, checkpoint):
        found = jobs.causal_logits(Layout(), directory, IDS)
        assert found is not None
        assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-4
    assert expected.std() > 1
    if shape.rope_scaling is not None:
        assert (expected - without_scaling(source)).abs().max() > 0.1

    for layout in (shape.family.plain, shape.family.block_diffusion):
        out, manifest = source.with_name(layout.format), read_manifest(checkpoint)
        export_hf.convert(
            checkpoint, out, manifest, shape, model_format=layout.format, dtype="fp32"
        )
        with open_weights(out) as exported:
            assert exported.names() == [*stored]
            assert all(torch.equal(exported.get(name), stored[name]) for name in stored)
        loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
        assert type(loaded).__name__ == layout.architecture
        tokenizer: Any = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
        assert tokenizer.mask_token_id == MASK_ID
        ids = torch.tensor(IDS[2:])
        causal = torch.ones(len(IDS[2]), len(IDS[2]), dtype=torch.bool).tril()[None, None]
        logits = loaded(ids, attention_mask=causal if layout.has_code else None).logits[0]
        torch.testing.assert_close(logits, oracle.causal_logits(model, IDS[2]), rtol=0, atol=1e-5)
    assert said(verify.compare(source, checkpoint, manifest)) == ["weights", "logits", "tokens"]


def without_scaling(source: Path) -> torch.Tensor:
    """Logits of the same weights where the context was not stretched."""
    model: Any = oracle.load(source)
    rotary, config = model.model.rotary_emb, model.config
    rotary.inv_freq, _ = type(rotary).compute_default_rope_parameters(config)
    rotary.attention_scaling = 1.0
    return torch.cat([oracle.causal_logits(model, ids) for ids in IDS])


def said(lines: Iterator[str]) -> list[str]:
    return [line.partition(":")[0] for line in lines]
