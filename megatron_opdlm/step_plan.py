"""What each step works on, as a pure function of its number: prompts, lengths, decoding, learning
rates, and which responses are recorded ones. Nothing here needs a checkpoint to resume.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import partial
from typing import Self

from megatron_opdlm import curriculum
from megatron_opdlm.config import Config
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.engine.slots import Request
from megatron_opdlm.errors import InputError
from megatron_opdlm.off_policy import Recorded, is_off_policy, recorded_trajectory
from megatron_opdlm.prompts import PromptOrder, PromptSet
from megatron_opdlm.records import Prompt, Trajectory, Vocabulary


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The configuration's schedules over the prompts of a run. Steps count from 1."""

    config: Config
    vocabulary: Vocabulary
    max_positions: int  # tokens of a prompt and its response
    prompts: PromptSet
    order: PromptOrder
    recorded: Recorded  # where recorded responses come from; unused at fraction 0
    planned_steps: int  # over which learning rate and threshold run
    total_steps: int  # of the run, which may end before the plan, or go on after it

    def validate(self) -> Self:
        """InputError for what would otherwise stop one of the steps, perhaps on some ranks only: a
        schedule without room, a cache that is too small for the longest request.
        """
        self.decoding(1)
        tokens = self.config.rollout.kv_cache_tokens
        request = self._longest_request()
        if tokens is None or request is None:
            return self
        positions = request.positions(self.config.rollout.block_size)
        if tokens < positions:
            raise InputError(
                f"rollout.kv_cache_tokens={tokens} is less than the {positions} positions that "
                f"the longest prompt ({len(request.prompt.ids)} tokens) and its response (up to "
                f"{request.max_new_tokens}) take; raise it, or lower rollout.max_new_tokens or "
                "data.max_prompt_tokens"
            )
        return self

    @property
    def steps_told(self) -> str:
        """As people read it: ``480``, ``480 (planned: 483)``."""
        as_planned = self.total_steps == self.planned_steps
        return f"{self.total_steps}" + ("" if as_planned else f" (planned: {self.planned_steps})")

    @property
    def notes(self) -> list[str]:
        """What of the configuration has another effect than it looks like, for people."""
        curve, cap = self.config.curriculum, self.config.rollout.max_new_tokens
        train, epochs = self.config.train, self.config.data.epochs
        key, steps = "steps", train.steps
        if train.stop_after is not None:
            key, steps = "stop_after", train.stop_after
        notes = []
        if curve.kind != "constant" and curve.end > cap:
            notes.append(f"note: rollout.max_new_tokens={cap} caps curriculum.end={curve.end}")
        if steps > self.total_steps:
            notes.append(
                f"note: train.{key}={steps}, but {self.order.n} prompts are used up after "
                f"{self.total_steps} steps at data.epochs={epochs}: the run ends there; for more, "
                "raise data.epochs"
            )
        mask, prompts = self.vocabulary.mask_id, self.prompts.prompts
        if masked := [prompt.index for prompt in prompts if mask in prompt.ids]:
            notes.append(
                f"note: {len(masked)} of {len(prompts)} prompts hold the mask token {mask}, first "
                f"row {masked[0]} (from 0): the model reads it there as unknown text; leave such "
                "rows out, or choose another model.mask_token_id"
            )
        return notes

    def _longest_request(self) -> Request | None:
        """The one that takes most positions of all that any step can make; None: none makes one."""
        steps = range(1, self.total_steps + 1)
        recorded = partial(curriculum.off_policy_fraction, mixing=self.config.mixing)
        # Lengths never fall over the steps; the share of recorded responses may rise to 1.
        all_generate = recorded(self.total_steps) < 1
        last = self.total_steps if all_generate else bisect_left(steps, 1.0, key=recorded)
        if last == 0:
            return None
        block_size = self.config.rollout.block_size
        return max(
            (
                Request(sample=0, prompt=prompt, max_new_tokens=self._limit(last, prompt))
                for prompt in self.prompts.prompts
            ),
            key=lambda request: request.positions(block_size),
        )

    def budget(self, step: int) -> int:
        """Response tokens that the curriculum allows at this step."""
        return curriculum.generation_budget(step, self.config.curriculum, self.config.rollout)

    def requests(self, step: int) -> list[Request]:
        """Responses to generate; samples are numbered over all of the step's sequences."""
        off_policy = self._off_policy(step)
        each = self.config.rollout.responses_per_prompt
        requests = []
        for place, position in enumerate(self.order.batch(step)):
            prompt = self.prompts.prompts[position]
            limit = self._limit(step, prompt)
            for sample in range(place * each, (place + 1) * each):
                if not off_policy[sample]:
                    requests.append(Request(sample=sample, prompt=prompt, max_new_tokens=limit))
        return requests

    def recorded_trajectories(self, step: int) -> list[Trajectory]:
        """Recorded responses in place of the samples that are not generated."""
        trajectories = []
        for sample, recorded in enumerate(self._off_policy(step)):
            if recorded:
                prompt = self.recorded.prompt(step, sample)
                trajectories.append(
                    recorded_trajectory(
                        sample,
                        prompt,
                        self._limit(step, prompt),
                        self.config.rollout.block_size,
                        self.vocabulary,
                    )
                )
        return trajectories

    def _off_policy(self, step: int) -> list[bool]:
        rollout = self.config.rollout
        return is_off_policy(
            rollout.prompts_per_step * rollout.responses_per_prompt,
            curriculum.off_policy_fraction(step, self.config.mixing),
            (self.config.train.seed, step),
        )

    def _limit(self, step: int, prompt: Prompt) -> int:
        """The budget, the domain's cap, and the whole blocks that fit the model."""
        rollout = self.config.rollout
        limit = curriculum.response_limit(
            self.budget(step), prompt.domain, rollout.max_new_tokens_by_domain
        )
        whole_blocks = self.max_positions // rollout.block_size * rollout.block_size
        return min(limit, whole_blocks - len(prompt.ids))

    def decoding(self, step: int) -> Decoding:
        """How this step generates."""
        rollout = self.config.rollout
        return Decoding.of(
            rollout,
            threshold=curriculum.threshold_at(
                step, self.config.threshold_schedule, rollout, self.planned_steps
            ),
            seed=self.config.train.seed,
            logit_shift=self.config.loss.logit_shift,
        )

    def learning_rate(self, step: int, number: int, updates: int) -> float:
        """Rate of the ``number``-th of a step's ``updates`` optimizer steps; the schedule counts
        nominal updates, so that modes that make more states out of a rollout keep the same curve
        over steps."""
        rollout, o = self.config.rollout, self.config.optimizer
        nominal = curriculum.updates_per_step(
            rollout.prompts_per_step * rollout.responses_per_prompt,
            o.batch_size,
            self.config.train.inner_epochs,
        )
        position = (step - 1) * nominal + number * nominal / updates
        return curriculum.learning_rate(
            position, o, updates_per_step=nominal, total_steps=self.planned_steps
        )
