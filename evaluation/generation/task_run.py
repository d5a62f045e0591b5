"""One task of an evaluation: generate what is missing, grade it, keep both as they come."""

import time
from typing import Any

from evaluation.generation.predictions import Predictions
from evaluation.generation.verdicts import Verdicts, grade_in_parts
from evaluation.graded import PROMPT_TOO_LONG, graded_row, summary_of, tell_scorer_errors
from evaluation.prompting import response_text
from evaluation.tasks import Row, Task
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.records import Prompt, Trajectory
from megatron_opdlm.reporting.progress import Progress

_SAMPLE_BITS = 32  # a response's key: its number among the row's, then the row's index in 32 bits


def sample_key(index: int, sample: int) -> int:
    """Key of a response's random numbers; the first response of row ``index`` has key ``index``."""
    return sample << _SAMPLE_BITS | index


def line_of(trajectory: Trajectory, tokenizer: Any) -> Row:
    """Everything that was seen of a response. Lists hold this one response."""
    return {
        "prompt": tokenizer.decode(trajectory.prompt.ids, skip_special_tokens=False),
        "responses": [response_text(tokenizer, trajectory)],
        "response_ids": [trajectory.user_ids],
        "committed_at": [trajectory.committed_at[: trajectory.response_tokens]],
        "forwards": [trajectory.forwards],
        "passes": [trajectory.passes],
        "finish_reason": [trajectory.finish_reason],
    }


def without_room(prompt: Prompt, tokenizer: Any) -> Row:
    """What stands for a response where the prompt fills the model's positions: wrong, and said."""
    return {
        "prompt": tokenizer.decode(prompt.ids, skip_special_tokens=False),
        "responses": [""],
        "response_ids": [[]],
        "committed_at": [[]],
        "forwards": [0],
        "passes": [0],
        "finish_reason": [PROMPT_TOO_LONG],
    }


class TaskRun:
    """One model under one decoding, task by task. All ranks go through it together; the writer
    keeps, grades and speaks.
    """

    def __init__(
        self,
        generator: Any,
        decoding: Decoding,
        samples: int,
        settings: dict[str, Any],
        predictions: Predictions,
        *,
        show: bool,
    ) -> None:
        self.generator, self.tokenizer = generator, generator.tokenizer
        self.decoding, self.samples, self.settings = decoding, samples, settings
        self.predictions, self.show = predictions, show and generator.is_writer

    def run(self, task: Task, rows: list[Row], prompts: list[Prompt]) -> dict[str, Any]:
        """Evaluate one task: its summary row, on every rank."""
        done, summary = self.generator.share(
            (self.predictions.samples(task.name), self.predictions.summaries.get(task.name))
        )
        if summary is not None:
            return summary
        before, start = self.predictions.seconds(task.name), time.monotonic()
        self._generate(task, prompts, done, before - start)
        if self.generator.is_writer:
            summary = self._grade(task, rows, before - start)
        return self.generator.share(summary)

    def _generate(
        self, task: Task, prompts: list[Prompt], done: set[tuple[int, int]], offset: float
    ) -> None:
        """Every response that is not there yet. ``offset``: seconds from the monotonic clock to the
        task's own.
        """
        tokenizer, predictions = self.tokenizer, self.predictions
        left = [
            (prompt, sample)
            for prompt in prompts
            for sample in range(self.samples)
            if (prompt.index, sample) not in done
        ]
        total = len(prompts) * self.samples
        fitting = [pair for pair in left if self.generator.room(pair[0]) > 0]
        with Progress(task.name, total, total - len(left), show=self.show) as progress:

            def keep(index: int, sample: int, line: Row) -> None:
                line["seconds"] = time.monotonic() + offset
                predictions.add(task.name, index, sample, line)
                progress.advance(len(line["response_ids"][0]))

            def finished(trajectory: Trajectory) -> None:
                index, sample = trajectory.prompt.index, trajectory.sample >> _SAMPLE_BITS
                keep(index, sample, line_of(trajectory, tokenizer))

            if self.generator.is_writer:
                for prompt, sample in left:
                    if self.generator.room(prompt) < 1:
                        keep(prompt.index, sample, without_room(prompt, tokenizer))
            if fitting:
                self.generator.generate(
                    [prompt for prompt, _ in fitting],
                    self.decoding,
                    [sample_key(prompt.index, sample) for prompt, sample in fitting],
                    finished,
                )

    def _grade(self, task: Task, rows: list[Row], offset: float) -> dict[str, Any]:
        """Grade the whole task and keep the verdicts."""
        predictions = self.predictions.rows(task.name)
        verdicts = Verdicts(task, self.predictions.out)
        offset += verdicts.seconds  # of earlier attempts
        grades = grade_in_parts(task, rows, predictions, verdicts, show=self.show)
        for own, row_grades in zip(predictions, grades, strict=True):
            own.update(graded_row(own["index"], row_grades))
        summary = summary_of(
            task,
            rows,
            predictions,
            grades,
            seconds=time.monotonic() + offset,
            settings={**self.settings, **task.settings()},
        ).as_dict()
        too_long = sum(row["finish_reason"][0] == PROMPT_TOO_LONG for row in predictions)
        if too_long:
            summary["prompts_too_long"] = too_long
            print(
                f"evaluation: {task.name}: {too_long} of {len(rows)} prompts leave no room in the "
                f"model's {self.generator.longest} positions and count as wrong",
                flush=True,
            )
        tell_scorer_errors(summary)
        self.predictions.finish(task.name, predictions, summary)
        verdicts.discard()
        return summary
