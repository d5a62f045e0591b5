"""The two ends of a run that leave something behind: a request to stop leaves a checkpoint of the
last finished step, an update that cannot be made leaves its batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opdlm import parallel
from megatron_opdlm.errors import RunError, Stopped
from megatron_opdlm.run.failed_batch import FailedBatch
from megatron_opdlm.run.session import Session
from megatron_opdlm.supervision import preemption, watchdog
from megatron_opdlm.update import NonFiniteError


@contextmanager
def saved_when_interrupted(session: Session) -> Iterator[None]:
    """The steps of a run. Raises Stopped at the first safe point after a request, once everything
    is saved, and RunError for an update whose batch it has saved.
    """
    preemption.wait_for_safe_points()
    try:
        yield
    except Stopped:
        raise Stopped(_save(session)) from None
    except NonFiniteError as error:
        raise RunError(f"{error}; {_save_batch(session, error)}") from None


def _save(session: Session) -> str:
    """A checkpoint of the last finished step, unless there is one; what was done, in one line."""
    step = session.progress.step
    session.save()
    if parallel.is_writer():
        session.exports.abandon()
    session.close(exports=False)
    done = f"step {step} is saved" if step else "no step was finished"
    return f"by {parallel.broadcast_object(preemption.reason())}; {done}, the same command goes on"


def _save_batch(session: Session, error: NonFiniteError) -> str:
    watchdog.enter("saving the failed batch", session.progress.step + 1)
    batch = FailedBatch(
        step=session.progress.step + 1,
        states=error.states,
        reason=str(error),
        teacher=session.teacher_source.directory,
    )
    out = Path(session.config.train.out)
    session.checkpoints.finish()  # the one under way is of an earlier step, and good
    try:
        saved = batch.save(out, session.student.model, session.checkpoints)
    except RunError as problem:
        return str(problem)
    return f"the update's batch and the student's weights are in {saved}, with a README.md"
