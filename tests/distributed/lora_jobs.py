"""What the tests of low-rank terms make ranks do, as ``jobs`` does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_opdlm import parallel, replay
from megatron_opdlm.checkpoint import save_weights
from megatron_opdlm.config import load_config
from megatron_opdlm.model import lora
from megatron_opdlm.model.gpt import LanguageModel
from megatron_opdlm.model_files.huggingface_files import carry_over
from megatron_opdlm.model_files.manifest import BlockContract, write_manifest
from megatron_opdlm.parallel import Layout
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.rollout import Request, generate
from megatron_opdlm.run import build
from megatron_opdlm.teacher import score
from megatron_opdlm.update import Student
from tests.conftest import MASK
from tests.distributed import jobs

# isort: split
from megatron.core import parallel_state

Terms = dict[tuple[int, str, str], np.ndarray]  # (layer, linear, "a" or "b") -> whole matrix


def open_student(overrides: list[str]) -> Student:
    """The student that training would start with."""
    config = load_config(None, overrides)
    source, _ = build.open_pair(config)
    return build.build_student(source, config, jobs.join(model_layout(config)))


def whole_terms(
    model: LanguageModel, value: Callable[[torch.nn.Parameter], torch.Tensor]
) -> Terms | None:
    """A value of every factor, joined over all ranks; on rank 0. Asserts that what is replicated
    is equal bit for bit.
    """
    adapters = lora.adapters_of(model)
    assert adapters is not None
    share = {
        (layer, target, name): value(p).detach().numpy()
        for layer, target, adapter in adapters.named_terms()
        for name, p in adapter.named_parameters()
    }
    place = (parallel.data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (place, share))
    if parallel.rank() > 0:
        return None
    parts: dict[Any, dict[int, np.ndarray]] = {}
    for (_, rank), values in sorted(shares, key=lambda item: item[0]):
        for key, array in values.items():
            known = parts.setdefault(key, {}).setdefault(rank, array)
            assert np.array_equal(known, array), f"{key} differs between replicas"
    return {key: _joined(key[1], key[2], list(by_rank.values())) for key, by_rank in parts.items()}


def _joined(target: str, factor: str, parts: list[np.ndarray]) -> np.ndarray:
    columns = target in ("linear_proj", "linear_fc2")
    if columns == (factor == "b"):  # the whole factor
        assert all(np.array_equal(parts[0], part) for part in parts), f"{target} {factor} differs"
        return parts[0]
    if columns:
        return np.concatenate(parts, axis=1)
    if target == "linear_fc1":  # every rank holds [its gate; its up]
        halves = [np.split(part, 2) for part in parts]
        return np.concatenate([half[i] for i in (0, 1) for half in halves])
    return np.concatenate(parts)


def initial_terms(overrides: list[str]) -> Terms | None:
    """A and B of a new run."""
    return whole_terms(open_student(overrides).model, lambda p: p.data)


def fill_b(model: LanguageModel) -> None:
    """Terms that matter, as after training."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(".b"):
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def save_adapted(overrides: list[str], out: Path) -> tuple[Path, Terms]:
    """A checkpoint whose B are not zero, and its terms; on one rank."""
    config = load_config(None, overrides)
    source, _ = build.open_pair(config)
    student = build.build_student(source, config, jobs.join(Layout()))
    fill_b(student.model)
    save_weights(student.model, out / "weights")
    carry_over(source.files, out / "huggingface")
    contract, low_rank = BlockContract(mask_token_id=MASK), build.low_rank_of(config)
    write_manifest(out, kind="model", dtype="fp32", block_contract=contract, low_rank=low_rank)
    terms = whole_terms(student.model, lambda p: p.data)
    assert terms is not None
    return out, terms


def replay_with_gradients(overrides: list[str], trajectories: Path) -> dict[str, Any]:
    """What ``replay`` computes, with the factors' gradients on rank 0, and how many numbers have a
    gradient buffer on this rank.
    """
    built: list[Student] = []
    with jobs._listening_to_build_student(built):
        result = replay.replay(load_config(None, overrides), trajectories)
    (student,) = built
    jobs._complete_gradients(student)
    model = student.model
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in frozen(model))
    return result | {"gradients": whole_terms(model, lambda p: p.main_grad)}


def frozen(model: LanguageModel) -> list[torch.nn.Parameter]:
    """Parameters that are no factor."""
    return [p for name, p in model.named_parameters() if not name.startswith(f"{lora.NAME}.")]


def merged_weights(layout: Layout, checkpoint: Path) -> jobs.Arrays | None:
    """Weights of a checkpoint with low-rank terms, as a model without them takes them."""
    return jobs.under_hf_names(jobs.load(layout, checkpoint), lambda p: p.data)


def responses(overrides: list[str], requests: list[Request], **how: Any) -> list[Any]:
    """Trajectories by the student as training rolls it out."""
    student = open_student(overrides)
    made = generate(student.model, requests, key=(7, 3), **how).trajectories
    return sorted(made, key=lambda t: t.sample)


def both_teachers(overrides: list[str], rows: jobs.Rows) -> tuple[bool, bool] | None:
    """(whether the student stands in for the teacher, whether its targets equal those of a second
    model bit for bit); None but on the last stage.
    """
    config = load_config(None, overrides)
    sources = build.open_pair(config)
    hardware = jobs.join(model_layout(config))
    student = build.build_student(sources[0], config, hardware)
    fill_b(student.model)
    chosen = build.choose_teacher(student, *sources, config, hardware)
    step = jobs._step([rows], config, sources, hardware)
    found = score(chosen, step.finished)
    expected = score(build.build_teacher(sources[1], config, hardware), step.finished)
    adapted = lora.adapters_of(student.model)
    assert adapted is not None and adapted.enabled and student.model.training
    if found is None or expected is None:
        return None
    return chosen is student.model, torch.equal(found, expected)
