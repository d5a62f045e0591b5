"""Law 6: the rollout engine against a decoder without a cache (tests/oracle.py), and what a sample
may depend on.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from megatron_opdlm.diffusion import denoising, randomness
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.passes import sizes_to
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.parallel import Layout
from megatron_opdlm.records import Prompt, Trajectory, Vocabulary
from megatron_opdlm.rollout import Request, generate
from tests import oracle
from tests.conftest import LAST_TOKEN, MASK, VOCABULARY, TinyModels
from tests.distributed import jobs
from tests.tiny_requests import FORBIDDEN, IDS, request

KEY = (7, 3)  # seed, step


def requests(block_size: int) -> list[Request]:
    """Every prompt length modulo the block, one shorter than a block, and different limits."""
    lengths = [1, *range(block_size + 1, 2 * block_size + 1), 3 * block_size + 2]
    return [request(3 * i, n, limit=1 + (5 * i) % 8) for i, n in enumerate(lengths)]


def expected_trajectory(
    model: oracle.PreTrainedModel, asked: Request, decoding: Decoding, vocabulary: Vocabulary
) -> oracle.Decoded:
    def uniform(position: int, pass_index: int) -> float:
        keys = (*KEY, asked.sample, position, pass_index, randomness.DRAW_TOKEN)
        return float(randomness.uniform(*keys))

    rules = oracle.Rules(
        block_size=decoding.block_size,
        steps=decoding.denoising_steps,
        remasking=decoding.remasking,
        mask_id=vocabulary.mask_id,
        end_ids=vocabulary.end_ids,
        forbidden=vocabulary.forbidden_ids,
        threshold=decoding.threshold,
        entropy_bound=decoding.entropy_bound,
        logit_shift=decoding.logit_shift,
        temperature=decoding.temperature,
        top_k=decoding.top_k,
        top_p=decoding.top_p,
        uniform=uniform,
    )
    return oracle.decode(model, asked.prompt.ids, asked.max_new_tokens, rules)


def assert_is_brute_force(
    models: TinyModels,
    asked: Sequence[Request],
    decoding: Decoding,
    vocabulary: Vocabulary = IDS,
    **options: Any,
) -> list[Trajectory]:
    hf_dir = models.hf("student", tied=False, layers=2)
    reference = oracle.load(hf_dir)
    found = jobs.roll_out(
        Layout(), hf_dir, asked, decoding, vocabulary, key=KEY, slots=3, **options
    )
    for trajectory, one in zip(found, asked, strict=True):
        expected = expected_trajectory(reference, one, decoding, vocabulary)
        assert trajectory.response_ids == expected.response_ids
        assert trajectory.committed_at == expected.committed_at
        assert trajectory.confidence == pytest.approx(expected.confidence, abs=1e-4)
        margins = expected.margins if decoding.margins else []
        assert trajectory.margins == pytest.approx(margins, abs=1e-4)
        # a block costs its passes and nothing else: prefill and commits ride along
        assert (trajectory.passes, trajectory.forwards) == (expected.passes, expected.passes)
    return found


SIZES = [(1, 1), (1, 3), (3, 2), (3, 3), (3, 5), (4, 1), (4, 3), (4, 4), (4, 6)]


@pytest.mark.parametrize("logit_shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize(("block_size", "steps"), SIZES)
@pytest.mark.parametrize("remasking", denoising.REMASKING)
def test_engine_is_the_decoder_without_a_cache(
    models: TinyModels, remasking: str, block_size: int, steps: int, logit_shift: bool
):
    """Claim: tokens, commit passes, margins and the number of forwards equal recomputing everything
    in every pass, at every prompt length modulo B, for T < B, T = B and T > B, with sequences that
    enter and leave three slots at different times."""
    decoding = Decoding(
        block_size=block_size,
        denoising_steps=steps,
        remasking=remasking,
        threshold=0.3,  # of a random model: sometimes reached
        entropy_bound=2.5,
        logit_shift=logit_shift,
        margins=(block_size + steps) % 2 == 0,
    )
    assert_is_brute_force(models, requests(block_size), decoding)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "fixed-size"])
@pytest.mark.parametrize("logit_shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize(("block_size", "steps"), [(1, 1), (3, 2), (4, 4), (4, 6)])
def test_block_rows_are_the_decoder_without_a_cache(
    models: TinyModels, block_size: int, steps: int, logit_shift: bool, graphs: bool
):
    """Claim: decoding by block rows, as GPUs do it, makes the same tokens in as many forwards; also
    in forwards of a few fixed sizes, whose padding rows write where no sequence lives."""
    decoding = Decoding(
        block_size=block_size,
        denoising_steps=steps,
        remasking="low_confidence_dynamic",
        threshold=0.3,
        temperature=1.0,
        logit_shift=logit_shift,
        margins=graphs,
    )
    options = {"attention": "rows", "graphs": graphs}
    assert_is_brute_force(models, requests(block_size), decoding, **options)


def test_sizes_that_are_captured():
    """Claim: every number up to the limit has a size at most a quarter larger (from 8 on), and the
    sizes are few."""
    sizes = sizes_to(256)
    for count in range(1, 257):
        assert count <= next(size for size in sizes if size >= count) <= max(8, 1.25 * count)
    assert sizes[-1] == 256
    assert len(sizes) < 22
    assert sizes_to(2) == [2]


@pytest.mark.parametrize(
    "shaping",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 1.0, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("logit_shift", [False, True], ids=["", "shift"])
def test_drawn_tokens_are_those_of_the_decoder_without_a_cache(
    models: TinyModels, shaping: dict[str, float], logit_shift: bool
):
    """Claim: at temperature > 0 a sample is a pure function of (seed, step, sample, position,
    pass) and the model."""
    decoding = Decoding(
        block_size=4,
        denoising_steps=3,
        remasking="low_confidence_dynamic",
        threshold=0.25,
        logit_shift=logit_shift,
        **shaping,
    )
    found = assert_is_brute_force(models, requests(4), decoding)
    assert len({tuple(t.response_ids) for t in found}) == len(found)


def test_both_end_tokens_stop_and_the_others_go_on(models: TinyModels):
    """Claim (that the cases above are no empty ones): some responses stop, in mid-block and by
    either end token, others run to their limit."""
    decoding = Decoding(block_size=4, denoising_steps=4, temperature=1.0)
    asked = [request(i, 2 + i % 6, limit=9) for i in range(14)]
    found = assert_is_brute_force(models, asked, decoding)
    stopped = [t for t in found if t.finish_reason == "stop"]
    assert {t.user_ids[-1] for t in stopped} == set(IDS.end_ids)
    assert any(t.response_tokens < len(t.response_ids) for t in stopped)
    assert any(t.finish_reason == "length" for t in found)


def test_autoregressive_mode_is_greedy_generate(models: TinyModels):
    """Claim: mode=ar gives the tokens of transformers' greedy generate, forward for forward."""
    hf_dir = models.hf("teacher", tied=True, layers=2)
    reference = oracle.load(hf_dir)
    asked = [request(i, 1 + 2 * i, limit=9) for i in range(6)]
    decoding = Decoding(mode="ar", block_size=4, denoising_steps=2)
    found = jobs.roll_out(Layout(), hf_dir, asked, decoding, IDS, slots=4)
    for trajectory, one in zip(found, asked, strict=True):
        prompt = torch.tensor([one.prompt.ids])
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),  # else it hides pad tokens of the prompt
            max_new_tokens=one.max_new_tokens,
            do_sample=False,
            eos_token_id=list(IDS.end_ids),
            suppress_tokens=list(IDS.forbidden_ids),
        )[0, len(one.prompt.ids) :].tolist()
        assert trajectory.user_ids == trajectory.response_ids == expected
        assert trajectory.forwards == len(expected)
        assert set(trajectory.committed_at) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_does_not_depend_on_its_batch(models: TinyModels, temperature: float):
    """Claim: 64 samples at once, in other orders, in other slots and alone: the same tokens and
    the same counts."""
    hf_dir = models.hf("student", tied=True, layers=2)
    decoding = Decoding(
        block_size=4,
        denoising_steps=3,
        remasking="low_confidence_dynamic",
        threshold=0.25,
        temperature=temperature,
    )
    asked = [request(i, 1 + i % 11, limit=4 + i % 9) for i in range(64)]
    run = partial(jobs.roll_out, Layout(), hf_dir, decoding=decoding, vocabulary=IDS, key=KEY)
    together = run(requests=asked, slots=64)
    assert run(requests=asked[::-1], slots=64) == together
    assert run(requests=asked, slots=5) == together
    for one in (0, 17, 63):
        assert run(requests=[asked[one]]) == [together[one]]


def test_greedy_is_deterministic_and_drawing_depends_on_the_key(models: TinyModels):
    """Claim: temperature 0 ignores seed and step; temperature 1 depends on each of seed, step and
    sample, and on nothing else."""
    hf_dir = models.hf("student", tied=True, layers=2)
    asked = [request(i, 6, limit=8) for i in range(3)]
    twin = Request(sample=9, prompt=asked[0].prompt, max_new_tokens=8)

    def run(temperature: float, key: tuple[int, int]) -> list[list[int]]:
        decoding = Decoding(block_size=4, denoising_steps=4, temperature=temperature)
        made = jobs.roll_out(Layout(), hf_dir, [*asked, twin], decoding, IDS, key=key)
        return [t.response_ids for t in made]

    greedy = run(0.0, (1, 1))
    assert greedy == run(0.0, (2, 5)) and greedy[0] == greedy[3]
    drawn = run(1.0, (1, 1))
    assert drawn == run(1.0, (1, 1)) and drawn[0] != drawn[3]
    assert all(a != b for a, b in zip(drawn, run(1.0, (2, 1)), strict=True))
    assert all(a != b for a, b in zip(drawn, run(1.0, (1, 2)), strict=True))


def test_end_tokens_in_the_prompt_do_not_stop(models: TinyModels):
    """Claim: a prompt that ends with an end token in mid-block gets its whole response."""
    hf_dir = models.hf("student", tied=True, layers=2)
    end = IDS.end_ids[0]
    vocabulary = Vocabulary(
        size=VOCABULARY, mask_id=MASK, end_ids=(end,), pad_id=46, forbidden_ids=(*FORBIDDEN, end)
    )
    prompt = Prompt(index=0, ids=[3, 5, 9, 2, 11, end])
    asked = [Request(sample=0, prompt=prompt, max_new_tokens=7)]
    decoding = Decoding(block_size=4, denoising_steps=4, temperature=1.0)
    (found,) = jobs.roll_out(Layout(), hf_dir, asked, decoding, vocabulary)
    assert (found.finish_reason, found.response_tokens) == ("length", 7)
    assert len(found.response_ids) == 10


@pytest.mark.parametrize("limit", range(1, 10))
@pytest.mark.parametrize("prompt_tokens", [4, 5, 7])
def test_length_limit(models: TinyModels, prompt_tokens: int, limit: int):
    """Claim: generation runs through the block that holds response token N; users get N tokens,
    through the first end token if that is among them, and only then the reason is "stop"."""
    hf_dir = models.hf("student", tied=True, layers=2)
    asked = [request(i, prompt_tokens, limit) for i in range(8)]
    decoding = Decoding(block_size=4, denoising_steps=4, temperature=1.0)
    for found in jobs.roll_out(Layout(), hf_dir, asked, decoding, IDS):
        whole, given = found.response_ids, found.user_ids
        ends = [i for i, token in enumerate(whole) if token in IDS.end_ids]
        assert (prompt_tokens + len(whole)) % 4 == 0 and len(found.committed_at) == len(whole)
        if ends:
            assert len(whole) - 4 <= ends[0]  # the block of the first end token is the last
        else:
            assert len(whole) - 4 < limit <= len(whole)
        if ends and ends[0] < limit:
            assert (found.finish_reason, given) == ("stop", whole[: ends[0] + 1])
        else:
            assert (found.finish_reason, given) == ("length", whole[:limit])


def test_limits_belong_to_samples(models: TinyModels):
    """Claim: each sample of a batch stops at its own limit."""
    hf_dir = models.hf("student", tied=True, layers=2)
    vocabulary = jobs.without_end(IDS)
    asked = [request(i, 5, limit) for i, limit in enumerate([1, 3, 4, 11, 2, 8])]
    decoding = Decoding(block_size=4, denoising_steps=4)
    found = jobs.roll_out(Layout(), hf_dir, asked, decoding, vocabulary, slots=2)
    assert [t.response_tokens for t in found] == [1, 3, 4, 11, 2, 8]
    assert [len(t.response_ids) for t in found] == [3, 3, 7, 11, 3, 11]


def test_an_empty_prompt_can_be_answered_but_not_with_shifted_logits(models: TinyModels):
    """Claim: nothing before the first token is needed, except where it is predicted from it."""
    hf_dir = models.hf("student", tied=True, layers=2)
    asked = [Request(sample=0, prompt=Prompt(index=4, ids=[]), max_new_tokens=5)]
    (found,) = jobs.roll_out(Layout(), hf_dir, asked, Decoding(block_size=4), IDS)
    assert len(found.response_ids) % 4 == 0
    for decoding in (Decoding(block_size=4, logit_shift=True), Decoding(mode="ar")):
        with pytest.raises(InputError, match="prompt 4 is empty"):
            jobs.roll_out(Layout(), hf_dir, asked, decoding, IDS)


def test_forbidden_ids_are_never_drawn(models: TinyModels):
    """Claim: not even a flat distribution gives the mask token or an id without a token."""
    hf_dir = models.hf("student", tied=True, layers=2)
    asked = [request(i, 3, limit=13) for i in range(40)]
    decoding = Decoding(block_size=4, denoising_steps=1, temperature=50.0)
    made = jobs.roll_out(Layout(), hf_dir, asked, decoding, jobs.without_end(IDS))
    drawn = set(itertools.chain.from_iterable(t.response_ids for t in made))
    assert drawn == set(range(LAST_TOKEN + 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_a_logit_that_is_not_finite_ends_the_rollout(
    models: TinyModels, poison: float, temperature: float
):
    """Claim: a weight gone bad is an error that names a sample, never a token."""
    model = jobs.load(Layout(), models.hf("student", tied=False, layers=2))
    with torch.no_grad():
        model.output_layer.weight[7, 3] = poison
    decoding = Decoding(block_size=4, denoising_steps=4, temperature=temperature)
    with pytest.raises(RunError, match=r"logits for sample [0-2], position \d+, are not finite"):
        generate(model, [request(i, 3, limit=5) for i in range(3)], decoding, IDS, key=KEY)
