"""Which replica generates a request, and when its prompt joins."""

import random
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from evaluation.in_training import live_generator
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.decoder import DecoderKeeper
from megatron_opdlm.engine.pages import Pages
from megatron_opdlm.engine.slots import Queue, Request, SlotBooks, split_over_replicas
from megatron_opdlm.model.flops import forward_flops
from megatron_opdlm.model_files.manifest import BlockContract
from megatron_opdlm.parallel import Layout
from megatron_opdlm.records import Prompt
from megatron_opdlm.rollout import generate
from tests.conftest import TinyModels
from tests.distributed import jobs
from tests.tiny_requests import IDS, request

RULES = Decoding(block_size=4, denoising_steps=4)


def made(lengths: list[tuple[int, int]]) -> list[Request]:
    return [
        Request(sample=i, prompt=Prompt(index=i, ids=[1] * prompt), max_new_tokens=response)
        for i, (prompt, response) in enumerate(lengths)
    ]


def work(request: Request) -> int:
    """Tokens through the model with blocks of four in four passes and one commit."""
    return len(request.prompt.ids) + 5 * request.max_new_tokens


@pytest.mark.parametrize("replicas", [1, 2, 3, 8])
def test_work_is_balanced_and_complete(replicas: int):
    """Claim: every request has one replica, and the most loaded replica carries at most one
    request's work more than the least loaded one, whatever the spread of the limits."""
    draw = random.Random(replicas)
    requests = made([(draw.randint(1, 90), round(8 * 50 ** draw.random())) for _ in range(61)])
    shares = split_over_replicas(requests, replicas, RULES)
    assert sorted(i for share in shares for i in share) == list(range(61))
    loads = [sum(work(requests[i]) for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(work(request) for request in requests)
    # sorted by limit and dealt out in turn, as one would first, the long ones meet on one replica
    if replicas > 1:
        ideal = sum(loads) / replicas
        assert max(loads) < 1.05 * ideal


def test_a_replica_without_work():
    """Claim: fewer requests than replicas is legal."""
    assert split_over_replicas(made([(3, 4)]), 3, RULES) == [[0], [], []]


def test_limits_by_domain_are_what_is_balanced():
    """Claim: two long and two short responses go one of each to two replicas, although dealing
    them out in turn would put both long ones together."""
    shares = split_over_replicas(made([(5, 400), (5, 10), (5, 400), (5, 10)]), 2, RULES)
    assert [sorted(i % 2 for i in share) for share in shares] == [[0, 1], [0, 1]]


@pytest.mark.parametrize("budget", [1, 20, 45, 1000])
def test_prompts_join_within_the_budget(budget: int):
    """Claim: in no forward join more prompt tokens than the budget unless it is a single prompt,
    and as many join as fit."""
    lengths = [50, 30, 20, 10, 10, 5, 5, 5]  # same limit: admitted in this order
    queue = Queue(made([(n, 8) for n in lengths]), RULES, IDS, (1, 1), budget)
    books = SlotBooks(queue, 8, 64, Pages(range(9), 8, 64, 64), 1)
    waiting = deque(lengths)
    while waiting:
        admission = books.admit()
        assert admission is not None
        expected = [waiting.popleft()]
        while waiting and sum(expected) + waiting[0] <= budget:
            expected.append(waiting.popleft())
        assert books.known[admission.slots.numpy()].tolist() == expected
        assert admission.rows == sum(n // 4 + 1 for n in expected)
        assert admission.draws == sum(4 - n % 4 for n in expected)
    assert books.admit() is None


def test_what_joins_together_changes_no_token(models: TinyModels):
    """Claim: a budget that lets prompts join one by one gives the same trajectories."""
    model = jobs.load(Layout(), models.hf("student", tied=True, layers=2))
    asked = [request(i, 3 + i, limit=3 + i % 5) for i in range(9)]
    decoding = Decoding(block_size=4, denoising_steps=4, temperature=1.0)
    options = EngineOptions(slots=4)
    together = generate(model, asked, decoding, IDS, key=(1, 1), options=options)
    options = EngineOptions(slots=4, prefill_tokens=1)
    alone = generate(model, asked, decoding, IDS, key=(1, 1), options=options)
    assert alone.trajectories == together.trajectories


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "fixed-size"])
def test_sequences_that_outgrow_the_pages(
    models: TinyModels, monkeypatch: pytest.MonkeyPatch, graphs: bool
):
    """Claim: pages hold what sequences use: more sequences are at work than the budget has room for
    at their full lengths; where pages run out the youngest leave and go on later from their last
    finished block. Tokens and passes are those of a cache with room for everybody."""
    left = jobs.small_pages(monkeypatch)
    model = jobs.load(Layout(), models.hf("student", tied=True, layers=2))
    asked = [request(i, 3 + i, limit=30) for i in range(6)]
    for shift in (False, True):
        rules = Decoding(
            block_size=4, denoising_steps=3, temperature=1.0, logit_shift=shift, margins=shift
        )
        vocabulary = jobs.without_end(IDS)
        expected = generate(model, asked, rules, vocabulary, key=(1, 1)).trajectories
        options = EngineOptions(attention="rows", kv_cache_tokens=96, slots=5)
        with jobs.fixed_size_forwards(graphs):
            made = generate(model, asked, rules, vocabulary, key=(1, 1), options=options)
        assert made.trajectories == expected
        for trajectory, one in zip(made.trajectories, expected, strict=True):
            assert trajectory.confidence == pytest.approx(one.confidence, abs=1e-5)
            assert trajectory.margins == pytest.approx(one.margins, abs=1e-4)
            assert bool(trajectory.margins) == shift
        # 96 positions hold two of them, of 36 to 40 positions, at full length
        assert made.slot_utilisation * made.slots > 2.2
        assert left
        left.clear()


def test_what_was_captured_serves_the_next_rollout(models: TinyModels):
    """Claim: with a given cache budget a second rollout captures nothing, also where the longest
    prompt is another one, the threshold too, and the weights have changed in place, and it
    generates what a fresh decoder does. Other rules and weights that have moved get a new decoder;
    without a budget nothing is kept."""
    model = jobs.load(Layout(), models.hf("student", tied=True, layers=2))
    rules = Decoding(block_size=4, denoising_steps=3, temperature=1.0)
    options = EngineOptions(attention="rows", kv_cache_tokens=2048, slots=4)
    keeper = DecoderKeeper()

    def captured(rules: Decoding, *, longest: int = 9, options: EngineOptions = options) -> int:
        """Captures of a rollout with the keeper."""
        asked = [request(i, longest - i, limit=12) for i in range(6)]
        before = len(pieces)
        kept = generate(model, asked, rules, IDS, key=(1, 1), options=options, keeper=keeper)
        count = len(pieces) - before
        fresh = generate(model, asked, rules, IDS, key=(1, 1), options=options)
        assert kept.trajectories == fresh.trajectories
        return count

    with jobs.fixed_size_forwards(True) as pieces:
        assert captured(rules) > 3
        assert captured(rules) == 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        assert captured(replace(rules, threshold=0.5)) == 0
        keeps, new = captured(rules, longest=12), captured(replace(rules, denoising_steps=2))
        assert keeps < new > 3
        moved = next(model.parameters())
        moved.data = moved.data.clone()
        assert captured(replace(rules, denoising_steps=2)) > 3
        unlimited = replace(options, kv_cache_tokens=None)
        assert captured(rules, options=unlimited) > 3 and captured(rules, options=unlimited) > 3


def test_evaluations_take_over_what_is_kept(models: TinyModels):
    """Claim: the generator that evaluates a run's student keeps its decoder where the run's
    rollouts keep theirs, so there is one cache, and a second batch captures nothing."""
    model = jobs.load(Layout(), models.hf("student", tied=True, layers=2))
    session: Any = SimpleNamespace(
        student=SimpleNamespace(model=model),
        source=SimpleNamespace(files=models.hf("student", tied=True, layers=2), vocabulary=IDS),
        checkpoints=SimpleNamespace(
            block_contract=BlockContract(mask_token_id=IDS.mask_id, block_size=4)
        ),
        plan=SimpleNamespace(max_positions=64),
        config=SimpleNamespace(
            rollout=EngineOptions(attention="rows", kv_cache_tokens=2048, slots=4)
        ),
        decoders=DecoderKeeper(),
    )
    generator = live_generator(session)
    prompts = [request(i, 3 + i, limit=9).prompt for i in range(6)]
    decoding = replace(RULES, max_new_tokens=9)
    with jobs.fixed_size_forwards(True) as pieces:
        first = generator.generate(prompts, decoding, range(6))
        captured, cache = len(pieces), session.decoders._kept.cache
        assert generator.generate(prompts, decoding, range(6)) == first
        assert len(pieces) == captured > 3
        generate(
            model,
            [request(0, 3, limit=9)],
            RULES,
            IDS,
            key=(1, 1),
            options=session.config.rollout,
            keeper=session.decoders,
        )
        assert session.decoders._kept.cache is not cache


def test_operations_of_padded_forwards_are_counted(models: TinyModels):
    """Claim: passes of fixed size count all that they run: padding rows too, in the last layer
    every row, and the pass that was under way when the last sequence ended. One request of two
    blocks in one pass runs as two rows of one slot with room for four drawn tokens."""
    model_dir = models.hf("student", tied=True, layers=2)
    model = jobs.load(Layout(), model_dir)
    rules = Decoding(block_size=4, denoising_steps=1)
    with jobs.fixed_size_forwards(True):
        options = EngineOptions(attention="rows")
        made = generate(model, [request(0, 4, limit=4)], rules, IDS, key=(1, 1), options=options)
    expected = sum(
        forward_flops(model.shape, tokens=8, attended_pairs=pairs, projected_rows=4, read_rows=8)
        for pairs in (4 * (4 + 8), 2 * 4 * 4)
    )
    assert made.trajectories[0].forwards == 1
    assert made.flops == expected
