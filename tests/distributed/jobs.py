"""What the tests make ranks do. Every function runs on all ranks of a group, or in the calling
process with ``Layout()``, and returns plain values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm import parallel, replay, rollout, train
from megatron_opdlm.checkpoint import load_model
from megatron_opdlm.config import Config, load_config
from megatron_opdlm.configuration.engine_options import EngineOptions
from megatron_opdlm.diffusion import denoising, randomness, truncation
from megatron_opdlm.diffusion.blocks import block_lengths
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.divergence import Divergence, distillation_loss, likelihood_loss
from megatron_opdlm.engine import cache_budget, passes, slot_state
from megatron_opdlm.engine.slot_state import Draws
from megatron_opdlm.engine.slots import SlotBooks
from megatron_opdlm.errors import RunError
from megatron_opdlm.hardware import Hardware, select_hardware
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.attention_plan import causal_plan
from megatron_opdlm.model.gpt import LanguageModel, build_model
from megatron_opdlm.model.vocab_parallel import VocabularyShard, project, select_positions
from megatron_opdlm.model.weights import named_global_parameters
from megatron_opdlm.model_files.manifest import huggingface_dir
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.step import StepBatches, pack_step
from megatron_opdlm.packing.student import PackedBatch
from megatron_opdlm.parallel import Layout
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.records import State, Trajectory, UpdateReport, Vocabulary
from megatron_opdlm.rollout import Request, generate, generate_over_copies
from megatron_opdlm.run import build
from megatron_opdlm.run.fixed_states import states_of
from megatron_opdlm.run.session import my_share, packing_of
from megatron_opdlm.states import choose_states
from megatron_opdlm.teacher import rows_of, score
from megatron_opdlm.teacher_fp8 import quantize_fp8
from megatron_opdlm.update import Student, update

# isort: split
from megatron.core import parallel_state

from megatron_opdlm.model_files import names
from megatron_opdlm.model_files.shape import ModelShape, padded_vocab, read_shape

COLLECTIVE_SECONDS = 120  # a rank left alone in a collective gives up
Arrays = dict[str, np.ndarray]
Rows = Sequence[dict[str, Any]]


def join(layout: Layout) -> Hardware:
    """Build Megatron's groups for a layout."""
    return parallel.init(layout, timeout_seconds=COLLECTIVE_SECONDS)


def load(layout: Layout, model_dir: Path, **options: Any) -> LanguageModel:
    """A float32 model on a layout, ready for forwards."""
    hardware = join(layout)
    shape = read_shape(huggingface_dir(model_dir))
    model = build_model(shape, layout, torch.float32, hardware, **options)
    load_model(model, model_dir)
    return model.requires_grad_(False).eval()


def final_hidden(
    model: LanguageModel, tokens_N: Tensor, positions_N: Tensor, plan: AttentionPlan, read_M: Tensor
) -> Tensor | None:
    """Hidden states [M, H] on the last pipeline stage, None on the others."""
    config = model.config
    if not parallel.is_first_stage():
        ranks = config.tensor_model_parallel_size if config.sequence_parallel else 1
        shape = (len(tokens_N) // ranks, 1, config.hidden_size)
        model.set_input_tensor(
            parallel.receive_from_previous_stage(shape, torch.float32, tokens_N.device)
        )
    output = model.run(tokens_N, positions_N, plan)
    if parallel.is_last_stage():
        return select_positions(output, read_M, sequence_parallel=config.sequence_parallel)
    parallel.send_to_next_stage(output).wait()  # dropped before it has left, it may never arrive
    return None


def whole_logits(model: LanguageModel, hidden_MH: Tensor) -> np.ndarray:
    """Logits [M, vocab_size]; the rows that pad the layout must be -inf and are cut off."""
    logits = model.shard.gather_rows(project(hidden_MH, model.head_weight, model.shard))
    size = model.shape.vocab_size
    assert bool((logits[:, size:] == -torch.inf).all())
    return logits[:, :size].numpy()


@torch.no_grad()
def causal_logits(
    layout: Layout, model_dir: Path, sequences: Sequence[Sequence[int]]
) -> np.ndarray | None:
    """Logits of packed sequences, one after the other [tokens, V]; None but on the last stage."""
    model = load(layout, model_dir)
    tokens = [token for sequence in sequences for token in sequence]
    positions = [i for sequence in sequences for i in range(len(sequence))]
    tail = -len(tokens) % layout.tensor  # sequence parallelism splits the row
    read = torch.arange(len(tokens))
    lengths = [len(sequence) for sequence in sequences]
    plan = causal_plan(lengths, len(tokens) + tail, torch.device("cpu"), read=read)
    hidden = final_hidden(
        model,
        torch.tensor(tokens + [0] * tail),
        torch.tensor(positions + [0] * tail),
        plan,
        read,
    )
    return None if hidden is None else whole_logits(model, hidden)


def roll_out(
    layout: Layout,
    model_dir: Path,
    requests: Sequence[Request],
    decoding: Decoding,
    vocabulary: Vocabulary,
    *,
    key: tuple[int, int] = (7, 3),
    graphs: bool = False,
    **options: Any,
) -> list[Trajectory]:
    """Trajectories of all requests by rising sample, shared out over the models' copies as training
    does. With ``graphs``, forwards of fixed size are recorded and repeated: by calling them again,
    where the hardware has no graphs.
    """
    model = load(layout, model_dir)
    engine = EngineOptions(graphs=graphs, **options)
    with fixed_size_forwards(graphs):
        made = generate_over_copies(
            model, requests, decoding, vocabulary, key=key, options=engine
        ).trajectories
    return sorted(made, key=lambda t: t.sample)


def small_pages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pages of 8 tokens from now on; the list gets each slot whose sequence has to leave."""
    monkeypatch.setattr(cache_budget, "PAGE_TOKENS", 8)
    left: list[int] = []
    leave = SlotBooks._leave
    monkeypatch.setattr(
        SlotBooks, "_leave", lambda books, slot: (left.append(slot), leave(books, slot))
    )
    return left


@contextmanager
def fixed_size_forwards(on: bool) -> Iterator[list[Callable[[], Tensor]]]:
    """Give hardware without graphs a ``capture`` that does what graphs do: run a function to warm
    it up, then run it again into the same output. Yields what was captured.
    """
    captured: list[Callable[[], Tensor]] = []

    def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        captured.append(run)
        run()
        output = run()
        return lambda: output.copy_(run())

    hardware = select_hardware()
    if on and hardware.captures is None:
        rollout.select_hardware = lambda: replace(hardware, captures=lambda: capture)
    try:
        yield captured
    finally:
        rollout.select_hardware = select_hardware


Place = tuple[int, int, int]  # sample, absolute position, pass from 1


@contextmanager
def _listening_to_the_engine(
    seen: dict[Place, Tensor], requests: Sequence[Request], key: tuple[int, int]
) -> Iterator[None]:
    """Record the log-probabilities [V] that the engine draws from, before ids are forbidden."""
    places: list[Place] = []
    samples = {int(randomness.hash_keys(*key, r.sample)): r.sample for r in requests}
    draw, project_ = passes.ExactPasses.draw, passes.project

    def listening_draw(engine: Any, hidden: Tensor, draws: Draws) -> Tensor:
        keys, pass_index = (
            engine.state.numbers[field][draws.slot_M].tolist()
            for field in (slot_state.KEY, slot_state.PASSES)
        )
        places[:] = [
            (samples.get(key, -1), position, index + 1)
            for key, position, index in zip(
                keys, draws.position_M.tolist(), pass_index, strict=True
            )
        ]
        return draw(engine, hidden, draws)

    def listening_project(hidden: Tensor, weight: Tensor, shard: VocabularyShard, *ids: Any) -> Any:
        logits = shard.gather_rows(project(hidden, weight, shard))[:, : shard.vocab_size]
        for place, row in zip(places, logits.log_softmax(-1), strict=True):
            if place[0] >= 0:  # else padding
                seen[place] = row
        return project_(hidden, weight, shard, *ids)

    passes.ExactPasses.draw, passes.project = listening_draw, listening_project
    try:
        yield
    finally:
        passes.ExactPasses.draw, passes.project = draw, project_


@torch.no_grad()
def on_policy_gap(
    layout: Layout,
    model_dir: Path,
    requests: Sequence[Request],
    decoding: Decoding,
    vocabulary: Vocabulary,
    slots: int = 128,
) -> dict[str, Any] | None:
    """Largest difference between what the engine saw and what the training forward sees at the
    masked positions of all states of all trajectories; None but on the last stage.
    """
    model = load(layout, model_dir)
    seen: dict[Place, Tensor] = {}
    with _listening_to_the_engine(seen, requests, (7, 3)):
        engine = EngineOptions(slots=slots)
        made = generate(
            model, requests, decoding, vocabulary, key=(7, 3), options=engine
        ).trajectories
    states = choose_states(
        made,
        mode="all",
        block_size=decoding.block_size,
        vocabulary=without_end(vocabulary),  # tokens after an end token count here, too
        exclude_eos=False,
        key=(7, 3),
    )
    packing = Packing(
        block_size=decoding.block_size,
        mask_id=vocabulary.mask_id,
        logit_shift=decoding.logit_shift,
        tokens_per_microbatch=10**9,
        align=layout.tensor,
        device=torch.device("cpu"),
        context_ranks=parallel.context_size(),
        context_rank=parallel.context_rank(),
    )
    ((batch,),) = pack_step([states], packing).updates
    row = batch.student_tokens, batch.student_positions, batch.student_plan
    hidden = final_hidden(model, *row, batch.student_read)
    if hidden is None:
        return None
    log_q = torch.from_numpy(whole_logits(model, hidden)).log_softmax(-1)
    by_sample = {t.sample: t for t in made}
    places = [
        place
        for state in states
        for place in _places(state, by_sample[state.sample], decoding.block_size)
    ]
    assert len(set(places)) == len(places)
    assert set(places) == set(seen), "states and passes are not the same set"
    own = _own_places(states, batch, packing)
    assert len(own) == len(log_q)
    expected = torch.stack([seen[places[i]] for i in own])
    return {
        "gap": float((log_q - expected).abs().max()),
        "spread": float(expected.std()),
        "places": len(places),
        "own": own,
        "trajectories": made,
    }


def _own_places(states: Sequence[State], batch: PackedBatch, packing: Packing) -> list[int]:
    """Which of all masked positions this context rank reads, in its order."""
    alone = replace(packing, context_ranks=1, context_rank=0)
    ((whole,),) = pack_step([states], alone).updates
    tokens = set(batch.split.of_rank(packing.context_rank).tolist())
    return [i for i, read in enumerate(whole.student_read.tolist()) if read in tokens]


def _places(state: State, trajectory: Trajectory, block_size: int) -> Iterator[Place]:
    """Where and in which pass the engine saw each masked position of a state, in their order."""
    start, prompt = 0, len(state.prompt_ids)
    for length in block_lengths(prompt, len(state.response_ids), block_size):
        masked = [i for i in range(start, start + length) if state.masked[i]]
        for i in masked:
            yield state.sample, prompt + i, min(trajectory.committed_at[j] for j in masked)
        start += length


def replay_with_gradients(overrides: list[str], trajectories: Path) -> dict[str, Any]:
    """What the command ``replay`` computes, with ``gradients`` under Hugging Face names on rank
    0.
    """
    built: list[Student] = []
    with _listening_to_build_student(built):
        result = replay.replay(load_config(None, overrides), trajectories)
    _complete_gradients(built[0])
    return result | {"gradients": under_hf_names(built[0].model, lambda p: p.main_grad)}


def replay_error(overrides: list[str], trajectories: Path) -> str:
    """The message with which ``replay`` fails on this rank."""
    try:
        replay.replay(load_config(None, overrides), trajectories)
    except RunError as error:
        return str(error)
    raise AssertionError("replay succeeded")


@contextmanager
def _listening_to_build_student(built: list[Student]) -> Iterator[None]:
    original = build.build_student

    def build_student(*args: Any, **kwargs: Any) -> Student:
        built.append(original(*args, **kwargs))
        return built[-1]

    build.build_student = build_student
    try:
        yield
    finally:
        build.build_student = original


def _complete_gradients(student: Student) -> None:
    """The distributed optimizer leaves each replica with its slice of the reduced gradients: give
    every replica all slices.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_group()
    shares = [(buffer, group) for buffer in student.ddp.buffers]
    shares += [(buffer, experts) for buffer in student.ddp.expert_parallel_buffers]
    for buffer, group in shares:
        for bucket in buffer.buckets:
            slices = list(bucket.grad_data.chunk(dist.get_world_size(group)))
            gathered = [torch.empty_like(part) for part in slices]
            dist.all_gather(gathered, slices[dist.get_rank(group)].clone(), group=group)
            bucket.grad_data.copy_(torch.cat(gathered))


def under_hf_names(
    model: LanguageModel, value: Callable[[torch.nn.Parameter], Tensor]
) -> Arrays | None:
    """A value of every parameter (weights or gradients), joined over all ranks, under Hugging
    Face's names; on rank 0.

    Asserts that replicated values are equal: on all replicas, and norms on all tensor ranks.
    """
    share = {name: value(p).detach().numpy() for name, p in named_global_parameters(model)}
    place = (parallel.data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank())
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (place, share))
    if parallel.rank() > 0:
        return None
    parts: dict[str, dict[int, np.ndarray]] = {}
    for (_, tensor_rank), values in sorted(shares, key=lambda item: item[0]):
        for name, array in values.items():
            known = parts.setdefault(name, {}).setdefault(tensor_rank, array)
            assert np.array_equal(known, array), f"{name} differs between replicas"
    whole = {name: _joined(name, list(by_rank.values())) for name, by_rank in parts.items()}
    return _as_hugging_face(model.shape, model.vocab_size, whole)


def _joined(name: str, parts: list[np.ndarray]) -> Tensor:
    tensors = [torch.from_numpy(part) for part in parts]
    if name.endswith("router.weight"):  # whole on every tensor rank
        assert all(torch.equal(tensors[0], other) for other in tensors), f"{name} differs"
        return tensors[0]
    if name.endswith("linear_fc1.weight"):  # every rank holds [its gate; its up]
        halves = zip(*(tensor.chunk(2) for tensor in tensors), strict=True)
        return torch.cat([part for half in halves for part in half])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(tensors, dim=1)
    if tensors[0].ndim == 2 or name.endswith("bias"):  # of queries, keys and values
        return torch.cat(tensors)
    assert all(torch.equal(tensors[0], other) for other in tensors), f"{name} differs over ranks"
    return tensors[0]


def _as_hugging_face(shape: ModelShape, rows: int, whole: dict[str, Tensor]) -> Arrays:
    embedding, output = (whole.get(n) for n in (names.EMBEDDING, names.OUTPUT))
    assert embedding is not None
    if shape.tied and output is not None:  # the last pipeline stage has its own copy
        assert torch.equal(embedding, output)
    for tensor in (embedding, output):
        if tensor is not None:
            assert len(tensor) == rows
            assert not tensor[shape.vocab_size :].any(), "the layout's padding rows moved"
    named = names.hf_from_megatron(shape, lambda name: whole[name])
    return {name: tensor.numpy() for name, tensor in named}


def train_on(
    overrides: list[str], updates: Sequence[Rows], lr: float, *, overlapped: bool = False
) -> dict[str, Any]:
    """One optimizer step for each list of recorded states; losses, gradient norms, and the final
    weights on rank 0. ``overlapped``: gradients are summed as on a GPU, in several buckets.
    """
    config = load_config(None, overrides)
    source, teacher_source = build.open_pair(config)
    hardware = join(model_layout(config))
    if overlapped:
        hardware = replace(hardware, overlaps_reduction=True)
        with _small_buckets():
            student = build.build_student(source, config, hardware)
        assert len(student.ddp.bucket_groups) > 2
    else:
        student = build.build_student(source, config, hardware)
    teacher = build.build_teacher(teacher_source, config, hardware)
    objective = build.build_objective(config, teacher)
    step = _step(updates, config, (source, teacher_source), hardware)
    targets = score(teacher, step.finished)
    losses, norms = [], []
    for batches in step.updates:
        report = update(student, batches, targets, objective, lr)
        losses.append(_mean_loss(report))
        norms.append(report.grad_norm)
    weights = under_hf_names(student.model, lambda p: p.data)
    return {"losses": losses, "grad_norms": norms, "weights": weights}


@contextmanager
def _small_buckets() -> Iterator[None]:
    """Megatron's buckets would hold a tiny model whole."""
    original = build.DistributedDataParallelConfig
    small: Any = partial(original, bucket_size=20_000)
    build.DistributedDataParallelConfig = small
    try:
        yield
    finally:
        build.DistributedDataParallelConfig = original


def _step(
    updates: Sequence[Rows],
    config: Config,
    sources: tuple[build.ModelSource, build.ModelSource],
    hardware: Hardware,
) -> StepBatches:
    """Recorded rows of the updates of a step -> this replica's batches."""
    packing = packing_of(config, sources[0], hardware)
    mine = [my_share(states_of(rows, config, sources[0]), *sources, packing) for rows in updates]
    return pack_step(mine, packing)


def _mean_loss(report: UpdateReport) -> float:
    losses = parallel.gather_objects_over_data_parallel(report.sequence_loss)
    return sum(losses) / len(losses)


@torch.no_grad()
def teacher_targets(overrides: list[str], rows: Rows) -> list[tuple[int, np.ndarray]] | None:
    """(number of the row, log-probabilities [counted positions, V]) of every row, from the hidden
    states that ``score`` keeps; None but on the last stage.
    """
    config = load_config(None, overrides)
    source, teacher_source = build.open_pair(config)
    hardware = join(model_layout(config))
    teacher = build.build_teacher(teacher_source, config, hardware)
    if config.teacher.quantization == "fp8":
        sequences = [[*row["prompt_ids"], *row["response_ids"]] for row in rows]
        quantize_fp8(teacher, sequences, packing_of(config, source, hardware))
    step = _step([rows], config, (source, teacher_source), hardware)
    targets = score(teacher, step.finished)
    if targets is None:
        return None
    found = []
    for batch in step.updates[0]:
        hidden = rows_of(targets, batch.target)
        assert isinstance(hidden, torch.Tensor)
        log_p = torch.from_numpy(whole_logits(teacher, hidden)).log_softmax(-1)
        found += [
            (state.sample, log_p[batch.sequence == i].numpy())
            for i, state in enumerate(batch.states)
        ]
    return found


def divergence_over_shards(
    layout: Layout,
    divergence: Divergence | None,
    student: Sequence[np.ndarray],
    teacher: Sequence[np.ndarray],
    labels: np.ndarray,
    row_weight: np.ndarray,
    chunk_rows: int,
) -> dict[str, Any]:
    """Value and gradients of a divergence whose vocabulary is split over the tensor ranks (None:
    the likelihood of the labels).

    ``student`` and ``teacher`` are (hidden [M, H], output weight [V, H]); every rank takes its rows
    of the weights. Rows are compared one at a time. The gradients come back whole.
    """
    join(layout)
    size = len(student[1])
    shard = VocabularyShard(padded_vocab(size, layout.tensor) // layout.tensor, size)
    hidden = torch.from_numpy(student[0]).requires_grad_()
    weight = _shard_rows(torch.from_numpy(student[1]), shard).requires_grad_()
    common: dict[str, Any] = {
        "columns": min(shard.columns, size - shard.start),
        "reduction": shard,
        "chunk_rows": chunk_rows,
    }
    weights = torch.from_numpy(row_weight)
    with patch("megatron_opdlm.divergence.PIECE", 1):
        if divergence is None:
            loss = likelihood_loss(hidden, weight, torch.from_numpy(labels), weights, **common)
        else:
            share = _shard_rows(torch.from_numpy(teacher[1]), shard)
            states = torch.from_numpy(teacher[0])
            loss = distillation_loss(hidden, weight, states, share, weights, divergence, **common)
    loss.total.backward()
    assert hidden.grad is not None and weight.grad is not None
    rows = shard.gather_rows(weight.grad.t()).t()
    assert not rows[size:].any()
    return {
        "total": float(loss.total.detach()),
        "values": loss.value_M.numpy(),
        "faults": loss.fault_M.numpy(),
        "hidden": shard.sum(hidden.grad).numpy(),
        "weight": rows[:size].numpy(),
    }


def _shard_rows(weight: Tensor, shard: VocabularyShard) -> Tensor:
    padding = weight.new_full((shard.ranks * shard.columns - len(weight), weight.shape[1]), 3.0)
    return torch.cat([weight, padding])[shard.start : shard.start + shard.columns].clone()


def draw_over_shards(
    layout: Layout,
    logits: np.ndarray,
    uniform: np.ndarray,
    **shaping: Any,
) -> tuple[np.ndarray, ...]:
    """Draw from logits [M, V] whose columns are split over the tensor ranks -> token, confidence,
    entropy, margin.
    """
    join(layout)
    size = logits.shape[1]
    shard = VocabularyShard(padded_vocab(size, layout.tensor) // layout.tensor, size)
    whole = torch.full((len(logits), shard.ranks * shard.columns), -torch.inf)
    whole[:, :size] = torch.from_numpy(logits)
    local = whole[:, shard.start : shard.start + shard.columns]
    drawn = denoising.draw(local, torch.from_numpy(uniform), shard=shard, **shaping)
    return *(of_row.numpy() for of_row in drawn), denoising.margins(local, shard).numpy()


def truncations_over_shards(
    layout: Layout, log_p: np.ndarray, k: int, top_p: float
) -> tuple[np.ndarray, np.ndarray]:
    """(bool [M, V] of the k largest, log-probabilities [M, V] of the nucleus) of distributions
    whose columns are split over the tensor ranks.
    """
    join(layout)
    size = log_p.shape[1]
    shard = VocabularyShard(padded_vocab(size, layout.tensor) // layout.tensor, size)
    own = torch.from_numpy(log_p)[:, shard.start : shard.start + shard.columns]
    found = truncation.top_k(own, k, shard), truncation.nucleus(own.clone(), top_p, shard)
    missing = shard.columns - own.shape[1]
    padded = [torch.nn.functional.pad(x, (0, missing)) for x in found]
    chosen, kept = (shard.gather_rows(x)[:, :size].numpy() for x in padded)
    return chosen, kept


def train_run(overrides: list[str]) -> None:
    """What the command ``train`` does after it has parsed its arguments."""
    train.run(load_config(None, overrides))


def model_weights(model_dir: Path) -> Arrays:
    """Weights of a checkpoint under Hugging Face's names, read in this process."""
    weights = under_hf_names(load(Layout(), model_dir), lambda p: p.data)
    assert weights is not None
    return weights


def without_end(vocabulary: Vocabulary) -> Vocabulary:
    """The same ids, none of which ends a response: every masked position then counts."""
    return replace(vocabulary, end_ids=())


def layout_ranks(layout: Layout) -> tuple[int, int, int]:
    """(tensor rank, pipeline rank, data parallel rank) of this rank."""
    join(layout)
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel.data_parallel_rank(),
    )
