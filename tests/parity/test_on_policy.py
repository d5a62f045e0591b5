"""Law 2: at every state of a trajectory the training forward sees what the rollout engine saw."""

from dataclasses import replace

import pytest

from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.parallel import Layout
from megatron_opdlm.records import Prompt, Trajectory
from megatron_opdlm.rollout import Request
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.tiny_requests import IDS, request

SOON_OVER = replace(IDS, end_ids=(48, 21, 5, 33, 40))


def on_policy_requests(block_size: int) -> list[Request]:
    """Five prompts for every length modulo the block, and one that is a single token."""
    lengths = [1, *range(block_size, 6 * block_size)]
    return [request(5 * i, n, limit=6 + (3 * i) % 7) for i, n in enumerate(lengths)]


def assert_on_policy(found: dict) -> list[Trajectory]:
    assert found["spread"] > 1, "flat distributions would agree whatever the inputs"
    assert found["gap"] < 1e-4
    return found["trajectories"]


@pytest.mark.parametrize("logit_shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize(
    ("block_size", "steps", "remasking"),
    [
        (4, 4, "low_confidence_static"),
        (4, 3, "low_confidence_dynamic"),
        (3, 3, "low_confidence_static"),
        (3, 2, "low_confidence_dynamic"),
        (5, 4, "entropy_bounded"),
        (1, 1, "sequential"),
    ],
)
def test_training_sees_what_the_rollout_saw(
    models: TinyModels, block_size: int, steps: int, remasking: str, logit_shift: bool
):
    """Claim: at every prompt length modulo B, for every state of every block, at every masked
    position, also of blocks that a prompt's tail opens and after an end token in mid-block: the
    same distribution to 1e-4. All passes are covered, each by exactly one state."""
    decoding = Decoding(
        block_size=block_size,
        denoising_steps=steps,
        remasking=remasking,
        threshold=0.25,
        entropy_bound=3.0,
        temperature=1.0,
        logit_shift=logit_shift,
    )
    found = jobs.on_policy_gap(
        Layout(),
        models.hf("student", tied=logit_shift),
        on_policy_requests(block_size),
        decoding,
        SOON_OVER,
        slots=4,
    )
    assert found is not None
    made = assert_on_policy(found)
    assert {len(t.prompt.ids) % block_size for t in made} == set(range(block_size))
    assert any(t.finish_reason == "length" for t in made)
    if block_size > 1:
        ends = [t for t in made if t.finish_reason == "stop"]
        assert any(t.response_tokens < len(t.response_ids) for t in ends), "no end in mid-block"


def test_a_long_packed_row_stays_exact(models: TinyModels):
    """Claim: rotary positions and masks of many packed two-stream sequences do not drift."""
    prompt = Prompt(index=0, ids=[i % 40 for i in range(61)])
    asked = [Request(sample=i, prompt=prompt, max_new_tokens=30) for i in range(4)]
    decoding = Decoding(block_size=4, denoising_steps=2, temperature=1.0)
    hf_dir = models.hf("student", tied=True)
    found = jobs.on_policy_gap(Layout(), hf_dir, asked, decoding, jobs.without_end(IDS))
    assert found is not None
    assert_on_policy(found)
