"""The benchmark's baseline makes the engine's tokens; else the ratio would compare two tasks."""

import pytest

from benchmarks.static_batch_sampler import sample_static
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion import denoising
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.parallel import Layout
from megatron_opdlm.rollout import generate
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.tiny_requests import IDS, request

KEY = (7, 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("remasking", denoising.REMASKING)
def test_baseline_makes_the_engines_tokens(models: TinyModels, remasking: str, temperature: float):
    """Claim: same tokens at every prompt length modulo B, with responses that end by an end token
    and by their limit; the baseline takes one forward more per block, and prefills apart."""
    decoding = Decoding(
        block_size=4,
        denoising_steps=4,
        remasking=remasking,
        threshold=0.3,
        entropy_bound=2.5,
        temperature=temperature,
    )
    model = jobs.load(Layout(), models.hf("student", tied=False, layers=2))
    asked = [request(i, 1 + i % 9, limit=3 + i % 7) for i in range(14)]
    made = generate(model, asked, decoding, IDS, key=KEY, options=EngineOptions(slots=5))
    expected = [t.response_ids for t in made.trajectories]
    found = sample_static(model, asked, decoding, IDS, key=KEY, batch_size=6)
    assert found.responses == expected
    assert found.forwards > max(t.forwards for t in made.trajectories)
