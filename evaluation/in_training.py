"""Tasks that the live student is asked while it trains: before step 1, every ``evaluation.every``
steps and after the last one, through the rollout engine; and which step was the best.

Nothing of it reaches training: every draw has its own key, and weights are only read. What has
been evaluated stands in ``evaluation.jsonl``, so a run that goes on does what a stop cut off, and
nothing twice.
"""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation.run import evaluate, load_training_tasks
from evaluation.tasks import Row, Task, get_task
from megatron_opdlm import parallel
from megatron_opdlm.config import Config
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.errors import InputError
from megatron_opdlm.generator import Generator
from megatron_opdlm.metrics import EVALUATION
from megatron_opdlm.model_files.vocabulary import load_tokenizer
from megatron_opdlm.run.session import Session
from megatron_opdlm.supervision import activity, preemption

_LIFE_SECONDS = 1.0  # between signs of life while the writer grades
_NO_FIGURES = ("task", "seconds", "settings")  # of a summary row


@dataclass(kw_only=True)
class InTrainingEvaluation:
    """All ranks call its methods together. ``done`` and ``best`` are the same on all of them."""

    config: Config
    tasks: list[tuple[Task, list[Row]]]  # none: the run evaluates nothing
    done: set[int] = field(default_factory=set)  # steps evaluated with these settings
    best: tuple[float, int] | None = None  # score and step, of those with a checkpoint

    def begin(self, session: Session) -> None:
        """Take up what earlier starts of the run found, and evaluate where they did not get to it:
        before step 1, or after the step of the checkpoint that this start goes on from.
        """
        if not self.tasks:
            return
        if load_tokenizer(session.source.files) is None:
            raise InputError(
                f"model.path={session.source.directory} has no tokenizer, so responses to "
                "evaluation.tasks cannot be read; add its files, or use evaluation.every=0"
            )
        found = [row for row in _recorded(self.config) if row["settings"] == self.settings]
        self.done = {row["step"] for row in found}
        kept = [
            (row["score"], row["step"])
            for row in found
            if row["score"] is not None and session.checkpoints.has(row["step"])
        ]
        self.best = max(kept, key=_rank) if kept else None
        if self.config.evaluation.keep_best:
            session.checkpoints.mark_best(self.best[1] if self.best else None)
        self.run(session)

    def run(self, session: Session) -> None:
        """Evaluate the student as it is after the last finished step, where that is due."""
        step, last = session.progress.step, session.plan.total_steps
        due = step % max(self.config.evaluation.every, 1) == 0 or step == last
        if not self.tasks or not due or step in self.done:
            return
        watch = session.watch(step)
        with watch.phase("evaluation"), session.optimizer_away():
            rows, _ = evaluate(
                live_generator(session),
                [(_with_signs_of_life(task), problems) for task, problems in self.tasks],
                self.decoding,
                self.config.evaluation.responses_per_prompt,
                {},
                enable_thinking=self.config.data.enable_thinking,
            )
        self.done.add(step)
        score = self._score(rows)
        figures = {
            row["task"]: {key: row[key] for key in row if key not in _NO_FIGURES} for row in rows
        }
        seconds = watch.seconds["evaluation"]
        session.metrics.evaluation(
            step,
            {"score": score, "seconds": seconds, "tasks": figures, "settings": self.settings},
            {"evaluation": figures, "evaluation_score": score, "seconds_evaluation": seconds},
        )
        if step and score is not None and (self.best is None or score > self.best[0]):
            self.best = score, step
            if self.config.evaluation.keep_best:
                session.checkpoints.mark_best(step)
                session.save()

    @property
    def decoding(self) -> Decoding:
        """How responses are generated: in the blocks that the student is trained in."""
        section, rollout = self.config.evaluation, self.config.rollout
        return Decoding.of(
            section,
            block_size=rollout.block_size,
            denoising_steps=section.denoising_steps or rollout.denoising_steps,
            logit_shift=self.config.loss.logit_shift,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What two evaluations must share for their scores to be compared."""
        e = self.config.evaluation
        settings = {
            "tasks": [task.name for task, _ in self.tasks],
            "best_by": e.best_by,
            "limit": e.limit,
            "responses_per_prompt": e.responses_per_prompt,
            "enable_thinking": self.config.data.enable_thinking,
            **asdict(self.decoding),
        }
        return json.loads(json.dumps(settings))

    def _score(self, rows: list[dict[str, Any]]) -> float | None:
        """Accuracy of the task that decides, or the mean over all; None where one has none."""
        by = self.config.evaluation.best_by
        wanted = {get_task(by).name} if by else {row["task"] for row in rows}
        values = [row["accuracy"] for row in rows if row["task"] in wanted]
        return None if None in values else sum(values) / len(values)


def read_evaluation(config: Config) -> InTrainingEvaluation:
    """Read the data of ``evaluation.tasks``. InputError for a task that is unknown, has no data or
    cannot be graded on this machine: before any model is read.
    """
    return InTrainingEvaluation(config=config, tasks=load_training_tasks(config.evaluation))


class LiveGenerator(Generator):
    """The student in the middle of its training, on the ranks and with the budgets that it has."""

    def share(self, value: Any) -> Any:
        """The writer's value, on every rank. Grading may take the writer longer than a collective
        call waits, so the others wait for its sign first.
        """
        parallel.wait_for_writer(lambda: None, activity.advance)
        return super().share(value)


def live_generator(session: Session) -> LiveGenerator:
    """A generator around the run's student; a request to stop ends its responses early. It takes
    over the cache that the rollouts keep, so that there are never two.
    """
    return LiveGenerator(
        model=session.student.model,
        tokenizer=load_tokenizer(session.source.files),
        vocabulary=session.source.vocabulary,
        contract=session.checkpoints.block_contract,
        longest=session.plan.max_positions,
        options=session.config.rollout,
        keeper=session.decoders,
        stop=preemption.requested,
    )


def _rank(scored: tuple[float, int]) -> tuple[float, int]:
    """Order of evaluated steps: the higher score, then the earlier step."""
    return scored[0], -scored[1]


def _recorded(config: Config) -> list[dict[str, Any]]:
    """What stands in ``evaluation.jsonl``, on every rank."""
    rows: list[dict[str, Any]] = []
    file = Path(config.train.out) / EVALUATION
    if parallel.is_writer() and file.is_file():
        rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    return parallel.broadcast_object(rows)


def _with_signs_of_life(task: Task) -> Task:
    """The same task, whose grading is no hang to the watchdog: it has time limits of its own."""
    watched, grade_all = copy.copy(task), task.grade_all

    def grade(rows: list[Row], responses: list[list[str]]) -> Any:
        with _signs_of_life():
            return grade_all(rows, responses)

    watched.grade_all = grade  # type: ignore[method-assign]
    return watched


@contextmanager
def _signs_of_life() -> Iterator[None]:
    """Progress for the watchdog until the body has ended."""
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(_LIFE_SECONDS):
            activity.advance()

    thread = threading.Thread(target=show, name="grading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
