"""Claims: what ``import_hf`` streams is the checkpoint that Megatron would save; models come back
from it bit for bit; what is stacked is read a part at a time; damage is named."""

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import conversion
from checkpoint_tools import export_hf
from checkpoint_tools.export.safetensors_writer import write_weights
from checkpoint_tools.import_hf import convert
from checkpoint_tools.streaming import weight_writer
from checkpoint_tools.streaming.megatron_weights import DTYPES, read_weights, stored_key
from checkpoint_tools.streaming.weight_reader import StoredWeights
from megatron_opdlm import parallel
from megatron_opdlm.checkpoint import load_weights, save_weights
from megatron_opdlm.errors import InputError
from megatron_opdlm.model.gpt import build_model
from megatron_opdlm.model.weights import load_hf
from megatron_opdlm.model_files.manifest import BlockContract, read_manifest, write_manifest
from megatron_opdlm.model_files.names import hf_from_megatron
from megatron_opdlm.model_files.safetensors_dir import open_weights
from megatron_opdlm.model_files.shape import ModelShape, hf_names, read_shape
from megatron_opdlm.parallel import Layout
from megatron_opdlm.planning.public_shapes import SHAPES

# isort: split
from megatron.core import dist_checkpointing

from tests.tiny_models import make_qwen3

MASK = BlockContract(mask_token_id=64)
KINDS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "experts": {"tied": False, "experts": 4, "layers": 3},
}


@dataclass(frozen=True)
class Written:
    hf: Path
    shape: ModelShape
    dtype: str
    streamed: Path  # by import_hf
    saved: Path  # by Megatron, from a model that was filled from the same directory


@pytest.fixture(scope="module", params=[("tied", "bf16"), ("untied", "fp32"), ("experts", "bf16")])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    kind, dtype = request.param
    root = tmp_path_factory.mktemp(kind)
    hf = make_qwen3(root / "hf", seed=5, shards=2, dtype=DTYPES[dtype], **KINDS[kind])
    made = Written(hf, read_shape(hf), dtype, root / "streamed", root / "saved")
    with open_weights(hf) as weights, pytest.MonkeyPatch.context() as patched:
        patched.setattr(weight_writer, "FILE_BYTES", 100_000)  # several files,
        patched.setattr(weight_writer, "PIECE_BYTES", 3_000)  # and the embedding in many pieces
        convert(weights, made.streamed, MASK, dtype)
    hardware = parallel.init(Layout())
    model = build_model(made.shape, Layout(), DTYPES[dtype], hardware)
    load_hf(model, hf)
    save_weights(model, made.saved)
    return made


def whole(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor, read by Megatron."""
    described = dist_checkpointing.load_tensors_metadata(str(directory))
    loaded = dist_checkpointing.load(described, str(directory))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def test_the_same_checkpoint_as_megatrons(written: Written) -> None:
    """Keys, global shapes, types, values, side files."""
    streamed, saved = written.streamed / "weights", written.saved
    assert len(list(streamed.glob("*.distcp"))) > 2
    found, expected = whole(streamed), whole(saved)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype == DTYPES[written.dtype], key
        assert found[key].shape == tensor.shape, key
        assert torch.equal(found[key], tensor), key
    for name in ("common.pt", "metadata.json"):
        assert (streamed / name).is_file() and (saved / name).is_file()
    common = [torch.load(d / "common.pt", weights_only=True) for d in (streamed, saved)]
    assert common[0] == common[1]
    assert json.loads((streamed / "metadata.json").read_text()) == json.loads(
        (saved / "metadata.json").read_text()
    )


def test_no_time_goes_into_checksums_that_nobody_reads(written: Written) -> None:
    """Claim: the archives carry no CRC-32, in whichever thread they are written."""
    files = list((written.streamed / "weights").glob("*.distcp"))
    assert files
    for file in files:
        with zipfile.ZipFile(file) as last:  # of the archives that follow each other in it
            assert {entry.filename.split("/", 1)[1]: entry.CRC for entry in last.infolist()}[
                "data/0"
            ] == 0, file


def test_a_model_reads_it(written: Written) -> None:
    """Through Megatron's strict loader: all parameters, nothing left over."""
    hardware = parallel.init(Layout())
    model = build_model(written.shape, Layout(), DTYPES[written.dtype], hardware)
    expected = build_model(written.shape, Layout(), DTYPES[written.dtype], hardware)
    load_weights(model, written.streamed / "weights")
    load_hf(expected, written.hf)
    for (name, found), (_, value) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert torch.equal(found, value), name


@pytest.mark.parametrize("which", ["streamed", "saved"])
def test_parts_of_stacked_tensors(written: Written, which: str) -> None:
    """Read by layer and expert = cut out of the whole tensor that Megatron reads."""
    directory = written.streamed / "weights" if which == "streamed" else written.saved
    stored, expected = StoredWeights(directory), whole(directory)
    for key, tensor in expected.items():
        assert stored.size(key) == tensor.shape
        assert torch.equal(stored.read(key), tensor), key
        if key.startswith("model.decoder.layers."):
            for layer in range(len(tensor)):
                assert torch.equal(stored.read(key, (layer,)), tensor[layer]), key
        if ".experts.experts." in key:
            assert torch.equal(stored.read(key, (2, 3)), tensor[2, 3]), key


def test_what_is_read_may_be_written_to(written: Written) -> None:
    """A mapped tensor is the reader's own: neither the file nor another reader sees a change."""
    get = read_weights(written.streamed, written.shape)
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    before = get(name).clone()
    get(name).zero_()
    assert torch.equal(read_weights(written.streamed, written.shape)(name), before)


def test_round_trip(written: Written, tmp_path: Path) -> None:
    """Every tensor comes back, whatever the number of shards; the safetensors library reads it."""
    get = read_weights(written.streamed, written.shape)
    for limit in (20_000, 10**9):
        out = tmp_path / str(limit)
        out.mkdir()
        tensors = hf_from_megatron(written.shape, get)
        write_weights(out, written.shape, tensors, written.dtype, shard_bytes=limit)
        found = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
        with open_weights(written.hf) as weights:
            assert found.keys() == set(weights.names()) == hf_names(written.shape).keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, weights.get(name)), name


def test_pieces_cover_every_tensor_once(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_writer, "PIECE_BYTES", 3_000)
    counts: dict[str, torch.Tensor] = {}
    for piece in weight_writer.pieces(written.shape, 2):
        count = counts.setdefault(piece.key, torch.zeros(piece.total, dtype=torch.int32))
        place = (slice(o, o + s) for o, s in zip(piece.offset, piece.size, strict=True))
        count[tuple(place)] += 1
    assert counts.keys() == whole(written.saved).keys()
    assert all(bool((count == 1).all()) for count in counts.values())


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_another_type_rounds_once(written: Written, tmp_path: Path, stored: str) -> None:
    with open_weights(written.hf) as weights:
        convert(weights, tmp_path / "checkpoint", MASK, stored)
        get = read_weights(tmp_path / "checkpoint", written.shape)
        for name, tensor in hf_from_megatron(written.shape, get):
            assert torch.equal(tensor, weights.get(name).to(DTYPES[stored])), name


# --- the published shapes

PUBLISHED = {path.parent.name: path for path in sorted(SHAPES.glob("*/config.json"))}
LARGEST = {  # Qwen3-235B-A22B, where it differs from Qwen3-30B-A3B
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "moe_intermediate_size": 1536,
    "intermediate_size": 12288,
}


def scaled_down(name: str, directory: Path) -> ModelShape:
    """The published configuration with its proportions of heads, groups and widths, and its kind of
    embedding, at a size for tests."""
    largest = name == "Qwen3-235B-A22B"
    config = json.loads(PUBLISHED["Qwen3-30B-A3B" if largest else name].read_text())
    config |= LARGEST if largest else {}
    for key, factor in (
        ("hidden_size", 32),
        ("intermediate_size", 64),
        ("moe_intermediate_size", 64),
        ("head_dim", 16),
        ("num_experts", 16),
        ("num_experts_per_tok", 4),
    ):
        if key in config:
            config[key] //= factor
    directory.mkdir()
    config |= {"num_hidden_layers": 3, "vocab_size": 211}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 5, "pad_token_id": 5})
    )
    return read_shape(directory)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", [*PUBLISHED, "Qwen3-235B-A22B"])
def test_round_trip_of_published_shapes(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = scaled_down(name, tmp_path / "hf")
    generator = torch.Generator().manual_seed(3)
    sizes = hf_names(shape)
    tensors = {key: torch.randn(size, generator=generator) for key, size in sizes.items()}
    write_weights(tmp_path / "hf", shape, tensors.items(), dtype, shard_bytes=200_000)
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    with open_weights(tmp_path / "hf") as weights:
        convert(weights, checkpoint, BlockContract(mask_token_id=7), dtype)
    monkeypatch.setattr(export_hf, "compare", lambda *arguments, **options: [])
    manifest = read_manifest(checkpoint)
    export_hf.convert(
        checkpoint, out, manifest, shape, model_format=shape.family.plain.format, dtype=dtype
    )
    with open_weights(out) as found:
        assert found.model_shape == shape
        assert found.names() == list(sizes)
        for key, tensor in tensors.items():
            assert torch.equal(found.get(key), tensor.to(DTYPES[dtype])), key


# --- damage


def streamed(tmp_path: Path) -> tuple[Path, ModelShape]:
    hf = make_qwen3(tmp_path / "hf", tied=True, seed=5, layers=1)
    with open_weights(hf) as weights:
        convert(weights, tmp_path / "checkpoint", MASK, "fp32")
    return tmp_path / "checkpoint", read_shape(hf)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    """By the checksum, before anything is written."""
    checkpoint, shape = streamed(tmp_path)
    file = checkpoint / "weights" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        export_hf.convert(
            checkpoint,
            tmp_path / "out",
            read_manifest(checkpoint),
            shape,
            model_format="qwen3",
            dtype="fp32",
        )
    assert not (tmp_path / "out").exists()


def test_a_description_that_does_not_fit(tmp_path: Path) -> None:
    """Torn records, missing blocks, records of another tensor, missing keys, no description."""
    checkpoint, shape = streamed(tmp_path)
    weights = checkpoint / "weights"
    key = stored_key("decoder.layers.0.mlp.linear_fc1.weight")[0]
    index = weights / ".metadata"
    good = index.read_bytes()

    def read_with(change) -> None:
        described = pickle.loads(good)
        change(described)
        index.write_bytes(pickle.dumps(described))
        StoredWeights(weights).read(key)

    def shorten(described) -> None:
        places = [v for k, v in described.storage_data.items() if k.fqn == key]
        places[0].length = 100

    def swap(described) -> None:
        mine = next(k for k in described.storage_data if k.fqn == key)
        other = next(k for k in described.storage_data if k.fqn != key)
        described.storage_data[mine] = described.storage_data[other]

    def lose(described) -> None:
        described.state_dict_metadata[key].chunks.pop()

    def forget(described) -> None:
        del described.state_dict_metadata[key]

    for change, reason in (
        (shorten, "cannot be read"),
        (swap, "another tensor than its description"),
        (lose, f"{key} has 6144 of 12288 values"),
        (forget, f"no tensor {key}"),
    ):
        with pytest.raises(InputError, match=reason):
            read_with(change)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, kind="model", dtype="fp32", block_contract=MASK)
    with pytest.raises(InputError, match=r"lacks decoder\.layers\.0\.mlp\.linear_fc1\.weight"):
        read_weights(checkpoint, shape)  # the key is still forgotten
    index.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        StoredWeights(weights)


def test_a_header_that_lies(tmp_path: Path) -> None:
    """Bytes that are not those of the shape are refused before they are read."""
    hf = make_qwen3(tmp_path / "hf", tied=True, seed=5, layers=1)
    file = hf / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    first = min(
        (name for name in header if name[0] != "_"), key=lambda n: header[n]["data_offsets"]
    )
    header[first]["data_offsets"][1] -= 4
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(InputError, match="no safetensors file"):
        open_weights(hf)


# --- memory


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model of more than 4 GiB, no tensor above 32 MiB: neither command needs more than 1.1 GiB
    of memory that no file stands behind, the export's verification included."""
    size, peaks = conversion.measure_memory(tmp_path)
    assert size >= 4 * 2**30
    assert {peak.name: peak.bytes / 2**30 for peak in peaks if peak.bytes > 1.1 * 2**30} == {}
