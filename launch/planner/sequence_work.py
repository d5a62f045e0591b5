"""What a sequence of mean length costs, counted by the code that counts a run's operations."""

from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import torch

from megatron_opdlm.config import Config
from megatron_opdlm.configuration.models import Recompute
from megatron_opdlm.model.flops import forward_flops
from megatron_opdlm.packing.rows import Packing
from megatron_opdlm.packing.step import pack_step
from megatron_opdlm.records import Prompt, Trajectory
from megatron_opdlm.reporting import accounting
from megatron_opdlm.run import build
from megatron_opdlm.states import choose_states
from megatron_opdlm.storage.model_source import ModelSource

SAMPLES = 2  # sequences whose mean is taken: which state of a block is trained is drawn


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a step's sequences."""

    prompt: int  # mean
    response: int  # mean
    longest: int  # response, at most
    per_pass: float  # tokens that a denoising pass commits


@dataclass(frozen=True, kw_only=True)
class SequenceWork:
    """Operations and tokens of one sequence, over all that its replica does for it."""

    rollout_flops: float
    teacher_flops: float
    update_flops: float  # of one use; the teacher's projections included
    rollout_tokens: float  # that run through the layers while it is generated
    packed_tokens: float  # that the student reads, of all its states
    finished_tokens: float  # that the teacher reads
    trained_tokens: float
    states: float  # that are trained on


class Counter:
    """Counts for one configuration and pair of models, with kernels that skip what is hidden."""

    def __init__(self, config: Config, student: ModelSource, teacher: ModelSource) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.count = lru_cache(maxsize=None)(self._count)

    def _count(self, lengths: Lengths, *, recompute: Recompute) -> SequenceWork:
        config, block = self.config, self.config.rollout.block_size
        packing = Packing(
            block_size=block,
            mask_id=self.student.vocabulary.mask_id,
            logit_shift=config.loss.logit_shift,
            tokens_per_microbatch=1,
            align=1,
            device=torch.device("cpu"),
            alignment=config.states.block_alignment,
        )
        states = choose_states(
            [self._trajectory(lengths, sample) for sample in range(SAMPLES)],
            mode=config.states.mode,
            block_size=block,
            vocabulary=self.student.vocabulary,
            exclude_eos=config.loss.exclude_eos,
            key=(config.train.seed, 1),
            alignment=config.states.block_alignment,
            draws=config.states.per_response,
        )
        batches = pack_step([states], packing)
        asks = config.loss.kind != "nll"
        update = sum(
            accounting.student_flops(
                self.student.shape,
                batch,
                recompute=recompute,
                sequence_parallel=False,
                low_rank=build.low_rank_of(config),
                attention="flex",
            )
            + (accounting.projection_flops(self.teacher.shape, len(batch.labels)) if asks else 0)
            for batch in batches.updates[0]
        )
        asked = sum(
            accounting.teacher_flops(
                self.teacher.shape, batch, sequence_parallel=False, attention="flex"
            )
            for batch in batches.finished
        )
        rollout, run_tokens = self._generated(lengths)
        return SequenceWork(
            rollout_flops=rollout,
            teacher_flops=asked / SAMPLES if asks else 0.0,
            update_flops=update / SAMPLES,
            rollout_tokens=run_tokens,
            packed_tokens=sum(sum(b.lengths) for b in batches.updates[0]) / SAMPLES,
            finished_tokens=sum(sum(b.lengths) for b in batches.finished) / SAMPLES,
            states=len(states) / SAMPLES,
            trained_tokens=sum(state.trained_tokens for state in states) / SAMPLES,
        )

    def _trajectory(self, lengths: Lengths, sample: int) -> Trajectory:
        """A response that ran to the mean length; every pass committed as many tokens. Sequences
        differ in a token, so that the teacher is asked about each.
        """
        block, vocabulary = self.config.rollout.block_size, self.student.vocabulary
        roles = {*vocabulary.end_ids, vocabulary.mask_id}
        plain, other = islice((i for i in range(vocabulary.size) if i not in roles), 2)
        whole = -(-(lengths.prompt + lengths.response) // block) * block - lengths.prompt
        places = [(lengths.prompt + i) % block for i in range(whole)]
        return Trajectory(
            sample=sample,
            prompt=Prompt(
                index=sample,
                ids=[other if 1 << i & sample else plain for i in range(lengths.prompt)],
            ),
            response_ids=[plain] * whole,
            committed_at=[1 + int(place / lengths.per_pass) for place in places],
            response_tokens=lengths.response,
            finish_reason="length",
            forwards=0,
            passes=0,
        )

    def _generated(self, lengths: Lengths) -> tuple[float, float]:
        """(operations, tokens through the layers): the prompt once, each block in every pass and
        once more when its final tokens join the next block's first pass.
        """
        block = self.config.rollout.block_size
        passes = block / lengths.per_pass
        decoded = lengths.response * (passes + 1)
        seen = lengths.prompt + lengths.response / 2
        flops = forward_flops(
            self.student.shape,
            tokens=round(lengths.prompt + decoded),
            attended_pairs=lengths.prompt**2 / 2 + decoded * seen,
            # Of a block's B positions the first pass projects all, each later one those left.
            projected_rows=round(lengths.response * (passes + 1) / 2),
        )
        return flops, lengths.prompt + decoded
