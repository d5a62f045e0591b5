"""A model's fingerprint follows its content, not its place, and misses no tensor."""

import shutil

import torch
from safetensors.torch import load_file, save_file

from megatron_opdlm.model_files.fingerprint import fingerprint
from tests.tiny_models import edit_json


def test_every_tensor_and_the_configuration_count(models, tmp_path):
    """Claim: a copy has the same fingerprint, with a README or without; other values in any one
    tensor, another configuration or another tokenizer have another one."""
    copy = shutil.copytree(models.hf("student", tied=True, layers=2), tmp_path / "copy")
    expected = fingerprint(models.hf("student", tied=True, layers=2))
    (copy / "README.md").write_text("notes")
    assert fingerprint(copy) == expected
    weights = load_file(copy / "model.safetensors")
    seen = {expected}
    for name, tensor in weights.items():
        save_file({**weights, name: tensor * 1.01}, copy / "model.safetensors", {"format": "pt"})
        seen.add(fingerprint(copy))
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert fingerprint(copy) == expected
    edit_json(copy / "config.json", rope_theta=1.0)
    seen.add(fingerprint(copy))
    assert len(seen) == len(weights) + 2


def test_a_checkpoint_is_known_by_its_manifest(models, tmp_path):
    """Claim: the checksums of a Megatron checkpoint stand for its files; nothing else is read."""
    copy = shutil.copytree(models.imported("student", tied=True), tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(models.imported("student", tied=True))
    shutil.rmtree(copy / "weights")
    assert fingerprint(copy) == fingerprint(models.imported("student", tied=True))
    edit_json(copy / "manifest.json", seal="0")
    assert fingerprint(copy) != fingerprint(models.imported("student", tied=True))


def test_of_very_many_tensors_some_are_looked_into(tmp_path):
    """Claim: a model of more tensors than are looked into costs no more reads, and one whose
    values are others everywhere is told from it."""
    tensors = {f"expert.{i}": torch.full((2,), float(i)) for i in range(3000)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    save_file({k: v + 1 for k, v in tensors.items()}, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before
