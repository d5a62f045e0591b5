"""One recorded rollout, and what it must cost: the fixed states that layouts and packings are
compared on.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.parallel import Layout
from megatron_opdlm.states import choose_states
from tests import oracle
from tests.conftest import END_IDS, MASK, TinyModels
from tests.distributed import jobs
from tests.tiny_requests import IDS, request

LOSS_TOLERANCE = 1e-5  # relative; of the gradient norm, too
GRADIENT_TOLERANCE = 1e-5  # |difference| / |gradient| over all parameters together
WEIGHT_TOLERANCE = 1e-4  # |difference| / |weights| after three updates
# The same against how far the updates moved the weights, which is what could go wrong. Adam divides
# by |gradient|, so rounding shows where a gradient is nearly zero.
MOVE_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loss on recorded states; every part of the definition differs between the two below."""

    name: str
    tied: bool
    block_size: int
    keys: tuple[str, ...] = ()
    oracle_options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def overrides(self) -> list[str]:
        """Configuration keys of ``replay`` and ``train`` but for the paths."""
        return [
            f"rollout.block_size={self.block_size}",
            f"rollout.denoising_steps={self.block_size}",
            f"model.mask_token_id={MASK}",
            *self.keys,
        ]


PLAIN = Case(name="forward_kl", tied=False, block_size=4)
SHIFTED = Case(
    name="jsd-shift-exclude_eos",
    tied=True,
    block_size=3,
    keys=(
        "loss.kind=jsd",
        "loss.jsd_alpha=0.3",
        "loss.logit_shift=true",
        "loss.exclude_eos=true",
    ),
    oracle_options={"kind": "jsd", "alpha": 0.3, "logit_shift": True, "exclude_eos": True},
)


def record(hf_dir: Path, block_size: int, *, seed: int) -> list[dict[str, Any]]:
    """States of a rollout: prompts of every length modulo the block, responses that end at once,
    in mid-block and never; two more responses to one of the prompts; then states that no rollout
    makes: nothing masked, and several of a response that is cut in mid-block."""
    lengths = [1, *range(block_size, 2 * block_size + 1)]
    lengths += [3 * block_size - 1] * (1 - len(lengths) % 2)  # replicas get unequal shares
    asked = [request(20 * seed + i, n, limit=3 + (4 * i) % 11) for i, n in enumerate(lengths)]
    decoding = Decoding(block_size=block_size, denoising_steps=block_size, temperature=1.0)
    made = jobs.roll_out(Layout(), hf_dir, asked, decoding, IDS, key=(seed, 1))
    states = choose_states(
        made,
        mode="one_per_block",
        block_size=block_size,
        vocabulary=IDS,
        exclude_eos=False,
        key=(seed, 1),
    )
    rows = [
        {"prompt_ids": s.prompt_ids, "response_ids": s.response_ids, "masked": s.masked}
        for s in states
    ]
    rows[1] = rows[1] | {"response_ids": [END_IDS[0], *rows[1]["response_ids"][1:]]}
    rows.insert(3, {"prompt_ids": [5, 8, 9], "response_ids": [1, 2, 3, 4], "masked": [0] * 4})
    cut = {"prompt_ids": [7, 7], "response_ids": list(range(20, 37))}
    # Three states of one sequence share its clean copy where they are packed together.
    masks = [0, 1] * 8 + [1], [1, 0] * 8 + [1], [1] * 4 + [0] * 13
    rows += [cut | {"masked": mask} for mask in masks]
    shared = max((row["prompt_ids"] for row in rows), key=len)
    for first in (11, 30):
        response = list(range(first, first + 2 * block_size))
        masked = [1, 0] * block_size
        rows.append({"prompt_ids": shared, "response_ids": response, "masked": masked})
    return [row | {"masked": [int(m) for m in row["masked"]]} for row in rows]


class Recorded:
    """Recorded states with their expected losses, gradients and updates, computed once."""

    def __init__(self, models: TinyModels, folder: Path) -> None:
        self._models, self._folder = models, folder

    @cache  # noqa: B019 -- one object a session
    def rows(self, case: Case, seed: int = 1) -> list[dict[str, Any]]:
        """States to replay."""
        return record(self._models.hf("student", tied=case.tied), case.block_size, seed=seed)

    @cache  # noqa: B019
    def file(self, case: Case) -> Path:
        """The same as a file for ``replay``."""
        path = self._folder / f"{case.name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows(case)))
        return path

    def overrides(self, case: Case) -> list[str]:
        """The case's keys and its checkpoints, which were imported once for all layouts."""
        student, teacher = (
            self._models.imported(r, tied=case.tied) for r in ("student", "teacher")
        )
        return [*case.overrides, f"model.path={student}", f"teacher.path={teacher}"]

    def losses(self, case: Case, student: Any, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
        """Loss of each sequence by the oracle, for any student."""
        teacher = oracle.load(self._models.hf("teacher", tied=case.tied))
        return oracle.loss(
            student,
            teacher,
            rows,
            block_size=case.block_size,
            mask_id=MASK,
            end_ids=END_IDS,
            **case.oracle_options,
        )

    @cache  # noqa: B019
    def expected(self, case: Case) -> dict[str, Any]:
        """Losses and gradients by the oracle."""
        student = oracle.load(self._models.hf("student", tied=case.tied))
        losses = self.losses(case, student, self.rows(case))
        mean = torch.stack(losses).mean()
        mean.backward()
        norm = oracle.gradient_norm(student)
        gradients = {name: g.numpy() for name, g in oracle.gradients(student).items()}
        return {
            "loss": mean.item(),
            "per_sequence": [loss.item() for loss in losses],
            "grad_norm": norm,
            "gradients": gradients,
        }

    @cache  # noqa: B019
    def expected_training(self, case: Case, lr: float, clip: float) -> dict[str, Any]:
        """Three updates on three rollouts by PyTorch's AdamW; ``start`` are the weights before."""
        student = oracle.load(self._models.hf("student", tied=case.tied))
        start = _weights(student)
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
        losses, norms = [], []
        for seed in (1, 2, 3):
            optimizer.zero_grad()
            mean = torch.stack(self.losses(case, student, self.rows(case, seed))).mean()
            mean.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(student.parameters(), clip)))
            losses.append(mean.item())
            optimizer.step()
        weights = _weights(student)
        return {"losses": losses, "grad_norms": norms, "weights": weights, "start": start}


def _weights(model: Any) -> dict[str, np.ndarray]:
    """A copy of every weight by its name in a safetensors file."""
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {name: tensor.numpy() for name, tensor in oracle.apart(named).items()}


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """L2 norm of the difference over all tensors."""
    assert set(found) == set(expected)
    return float(
        np.sqrt(sum(((found[n] - expected[n]).astype(np.float64) ** 2).sum() for n in expected))
    )


def length(tensors: dict[str, np.ndarray]) -> float:
    """L2 norm over all tensors."""
    return distance(tensors, {name: np.zeros_like(t) for name, t in tensors.items()})
