"""Claims: names and layouts are translated bit for bit, against expectations written row by row;
every slice of every rank is used once; layouts that do not divide are refused with a remedy."""

import json
from pathlib import Path

import pytest
import torch

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files import names as names
from megatron_opdlm.model_files.families import QWEN3_MOE

SHAPE = names.ModelShape(
    layers=2,
    hidden=10,
    heads=6,
    groups=2,
    head_dim=4,
    ffn=14,
    vocab_size=7,
    tied=False,
    rope_theta=1e4,
    rms_eps=1e-6,
    max_positions=64,
)
TIED = names.ModelShape(**{**SHAPE.__dict__, "tied": True})
MOE = names.ModelShape(
    **{
        **SHAPE.__dict__,
        "experts": names.Experts(count=6, per_token=2, ffn=18, renormalize=True),
        "family": QWEN3_MOE,
    }
)


def random_weights(shape: names.ModelShape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(size, generator=generator) for name, size in names.hf_names(shape).items()
    }


def join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """What a global checkpoint holds of a parameter, from every rank's part."""
    if name.endswith(("norm.weight", "router.weight")):
        assert all(torch.equal(parts[0], part) for part in parts)
        return parts[0]
    if name.endswith("linear_fc1.weight"):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(parts, dim=1 if name.endswith(("linear_proj.weight", "fc2.weight")) else 0)


@pytest.mark.parametrize("shape", [SHAPE, TIED, MOE], ids=["untied", "tied", "experts"])
@pytest.mark.parametrize("tp", [1, 2])
def test_round_trip_is_bit_for_bit(shape: names.ModelShape, tp: int) -> None:
    weights = random_weights(shape)
    padded = names.padded_vocab(shape.vocab_size, tp)
    joined = {
        name: join(
            name,
            [
                names.megatron_from_hf(name, shape, weights.__getitem__, rank, tp, padded)
                for rank in range(tp)
            ],
        )
        for name in names.megatron_names(shape)
    }
    returned = dict(names.hf_from_megatron(shape, joined.__getitem__))
    assert returned.keys() == weights.keys()
    assert all(torch.equal(returned[name], weights[name]) for name in weights)
    if tp == 2:
        assert joined["embedding.word_embeddings.weight"].shape == (8, 10)
        assert not joined["embedding.word_embeddings.weight"][7].any()


def test_query_key_value_rows_are_grouped() -> None:
    weights = random_weights(SHAPE)
    prefix = "model.layers.1.self_attn."
    query, key, value = (weights[f"{prefix}{x}_proj.weight"] for x in "qkv")
    # 2 groups of 3 query heads of 4 rows: group g owns query rows 12g..12g+11, key rows 4g..4g+3.
    expected = [
        torch.cat([query[:12], key[:4], value[:4]]),
        torch.cat([query[12:], key[4:], value[4:]]),
    ]
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    for rank in range(2):
        part = names.megatron_from_hf(name, SHAPE, weights.__getitem__, rank, 2, 8)
        assert torch.equal(part, expected[rank])


def test_a_rank_has_its_part_of_gate_and_of_up() -> None:
    weights = random_weights(SHAPE)
    gate, up = (weights[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    part = names.megatron_from_hf(name, SHAPE, weights.__getitem__, 1, 2, 8)
    assert torch.equal(part, torch.cat([gate[7:], up[7:]]))


def test_experts_keep_their_number_in_both_names() -> None:
    """Claim: as published files number them, and as Megatron does in the whole model."""
    weights = random_weights(MOE)
    assert weights["model.layers.1.mlp.experts.5.down_proj.weight"].shape == (10, 18)
    assert weights["model.layers.1.mlp.gate.weight"].shape == (6, 10)
    assert "model.layers.1.mlp.gate_proj.weight" not in weights
    name = "decoder.layers.1.mlp.experts.5.linear_fc1.weight"
    gate, up = (f"model.layers.1.mlp.experts.5.{x}_proj.weight" for x in ("gate", "up"))
    assert name in names.megatron_names(MOE)
    assert names.sources(name, MOE) == (gate, up)
    part = names.megatron_from_hf(name, MOE, weights.__getitem__, 0, 2, 8)
    assert torch.equal(part, torch.cat([weights[gate][:9], weights[up][:9]]))
    attribute = names.split_layer(name)[1]
    assert names.split_expert(attribute) == (5, "mlp.experts.linear_fc1.weight")
    assert names.split_expert("mlp.linear_fc1.weight") == (None, "mlp.linear_fc1.weight")
    router = names.megatron_from_hf("decoder.layers.0.mlp.router.weight", MOE, weights.get, 1, 2, 8)  # type: ignore[arg-type]
    assert torch.equal(router, weights["model.layers.0.mlp.gate.weight"])


def test_fused_norm_names_read_the_same_tensors() -> None:
    assert names.sources("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", SHAPE) == (
        "model.layers.1.post_attention_layernorm.weight",
    )
    with pytest.raises(KeyError, match="no parameter"):
        names.sources("decoder.layers.1.mlp.gate.weight", SHAPE)
    with pytest.raises(KeyError, match="no parameter"):
        names.sources("decoder.layers.1.mlp.experts.linear_fc1.weight", MOE)


def test_a_tied_output_layer_reads_the_embedding() -> None:
    weights = random_weights(TIED)
    get = weights.__getitem__
    output = names.megatron_from_hf("output_layer.weight", TIED, get, 1, 2, 8)
    embedding = names.megatron_from_hf("embedding.word_embeddings.weight", TIED, get, 1, 2, 8)
    assert torch.equal(output, embedding)


@pytest.mark.parametrize(
    ("vocab", "tp", "rows"), [(151936, 8, 151936), (67, 2, 68), (67, 1, 67), (7, 4, 8)]
)
def test_padded_vocab(vocab: int, tp: int, rows: int) -> None:
    assert names.padded_vocab(vocab, tp) == rows


@pytest.mark.parametrize(
    ("tp", "pp", "reason"),
    [
        (4, 1, r"tensor_parallel=4 does not divide num_query_groups=2 \(toy\); use 1 or 2"),
        (1, 3, r"pipeline_parallel=3 does not divide num_layers=2 \(toy\); use 1 or 2"),
        (0, 1, "tensor_parallel=0 is not positive"),
    ],
)
def test_layouts_that_do_not_divide(tp: int, pp: int, reason: str) -> None:
    names.check_layout(SHAPE, 2, 2, "toy")
    with pytest.raises(InputError, match=reason):
        names.check_layout(SHAPE, tp, pp, "toy")


def test_context_ranks_that_do_not_divide_the_heads() -> None:
    """Claim: they share the heads of a tensor rank, whatever the number of groups."""
    names.check_layout(SHAPE, 1, 1, "toy", cp=SHAPE.heads)
    reason = (
        "context_parallel=2 does not divide the 3 attention heads of a tensor rank .* use 1 or 3"
    )
    with pytest.raises(InputError, match=reason):
        names.check_layout(SHAPE, 2, 1, "toy", cp=2)


@pytest.mark.parametrize(
    ("shape", "tp", "ep", "reason"),
    [
        (MOE, 1, 4, r"expert_parallel=4 does not divide num_experts=6 \(toy\); use 1, 2, 3 or 6"),
        (SHAPE, 1, 2, "expert_parallel=2 shares out experts, and toy has none"),
        (MOE, 1, 0, "expert_parallel=0 is not positive"),
    ],
)
def test_expert_ranks_that_do_not_divide(
    shape: names.ModelShape, tp: int, ep: int, reason: str
) -> None:
    names.check_layout(MOE, 2, 2, "toy", ep=3)
    with pytest.raises(InputError, match=reason):
        names.check_layout(shape, tp, 1, "toy", ep=ep)


@pytest.mark.parametrize(
    ("layers", "hidden", "ffn", "heads", "parameters", "active"),
    [
        (48, 2048, 768, 32, 30_532_122_624, 3_353_032_704),
        (94, 4096, 1536, 64, 235_093_634_560, 22_190_763_520),
    ],
    ids=["Qwen3-30B-A3B", "Qwen3-235B-A22B"],
)
def test_parameters_of_the_published_mixtures(
    layers: int, hidden: int, ffn: int, heads: int, parameters: int, active: int
) -> None:
    shape = names.ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=4,
        head_dim=128,
        ffn=3 * hidden,
        vocab_size=151936,
        tied=False,
        rope_theta=1e6,
        rms_eps=1e-6,
        max_positions=40960,
        experts=names.Experts(count=128, per_token=8, ffn=ffn, renormalize=True),
        family=QWEN3_MOE,
    )
    assert (shape.parameters, shape.active_parameters) == (parameters, active)


@pytest.mark.parametrize(
    ("layers", "hidden", "ffn", "heads", "tied", "parameters"),
    [(28, 1024, 3072, 16, True, 596_049_920), (36, 4096, 12288, 32, False, 8_190_735_360)],
    ids=["Qwen3-0.6B", "Qwen3-8B"],
)
def test_parameters_of_the_published_sizes(
    layers: int, hidden: int, ffn: int, heads: int, tied: bool, parameters: int
) -> None:
    shape = names.ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=8,
        head_dim=128,
        ffn=ffn,
        vocab_size=151936,
        tied=tied,
        rope_theta=1e6,
        rms_eps=1e-6,
        max_positions=40960,
    )
    assert shape.parameters == parameters


CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 14,
    "vocab_size": 7,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}


def write_config(directory: Path, **changes: object) -> Path:
    kept = {key: value for key, value in {**CONFIG, **changes}.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def test_read_shape_takes_flat_and_nested_rope(tmp_path: Path) -> None:
    assert names.read_shape(write_config(tmp_path)) == SHAPE
    nested = {"rope_type": "default", "rope_theta": 1e4}
    write_config(tmp_path, rope_theta="absent", rope_parameters=nested)
    assert names.read_shape(tmp_path) == SHAPE


MOE_CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 18,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def test_read_shape_takes_experts_as_either_transformers_writes_them(tmp_path: Path) -> None:
    assert names.read_shape(write_config(tmp_path, **MOE_CONFIG)) == MOE
    renamed = {**MOE_CONFIG, "num_experts": "absent", "num_local_experts": 6}
    assert names.read_shape(write_config(tmp_path, **renamed)) == MOE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 mixes layers"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] mixes layers"),
        ({"num_experts": "absent"}, "has no num_experts"),
        ({"num_local_experts": 4}, "num_experts=6 and num_local_experts=4 disagree"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 exceeds num_experts=6"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 is neither true nor false"),
        ({"moe_intermediate_size": "absent"}, "has no moe_intermediate_size"),
        ({"architectures": ["Qwen3MoeModel"]}, "'Qwen3MoeModel'; use a language model"),
    ],
)
def test_mixtures_we_would_compute_wrongly(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    write_config(tmp_path, **{**MOE_CONFIG, **changes})
    with pytest.raises(InputError, match=reason):
        names.read_shape(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is no model that is built; .* or 'llama'"),
        ({"model_type": "absent"}, "model_type=None is no model that is built"),
        ({"hidden_size": "absent"}, "has no hidden_size"),
        ({"hidden_size": 10.5}, "hidden_size=10.5 is not a positive integer"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 does not divide num_attention_heads=6"),
        ({"head_dim": 3}, "head_dim=3 is odd"),
        ({"rope_theta": "absent"}, "has no rope_theta"),
        (
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta=10000.0, but rope_parameters has rope_theta=1000000.0; keep the one",
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, "rope_type='longrope'; built"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None is not a positive number"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor=None"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; only 1"),
        ({"attention_bias": True}, "attention_bias=true; of biases only"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"model_type": "mistral"}, "sliding-window .* set sliding_window to null"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding-window"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"tie_word_embeddings": "yes"}, "neither true nor false"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_configurations_we_would_compute_wrongly(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(InputError, match=reason):
        names.read_shape(tmp_path)
