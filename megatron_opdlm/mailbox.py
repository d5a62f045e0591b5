"""Finished responses on their way to the rank that writes, while all copies of the model go on.

They go through the key-value store at which the ranks met when they started. It needs no collective
call, so no copy waits for another, and no file system that the machines share.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_opdlm import parallel
from megatron_opdlm.errors import RunError
from megatron_opdlm.records import Prompt, Trajectory
from megatron_opdlm.supervision import activity

# isort: split
from megatron.core import parallel_state

_POLL_SECONDS = 0.2  # between looks into the store
_numbers = itertools.count()  # of mailboxes; every rank makes them in the same order


class Mailbox:
    """One call's post. The leader of each copy of the model sends; the writer, which leads the
    first copy, receives.
    """

    def __init__(self, deliver: Callable[[Trajectory], None]) -> None:
        """``deliver`` is called on the writer, with every copy's trajectories."""
        self._deliver = deliver
        self._name = f"evaluation/{next(_numbers)}"
        self._generator = parallel.generator_rank()
        self._others = range(1, parallel.generators())
        self._sent = 0
        self._received = dict.fromkeys(self._others, 0)
        self._looked = time.monotonic()

    def finished(self, trajectory: Trajectory) -> None:
        """A trajectory has ended here: deliver or send it."""
        if parallel.is_writer():
            self._deliver(trajectory)
            if time.monotonic() - self._looked > _POLL_SECONDS:
                self._receive()
        elif _leads():
            self._send(trajectory)

    def close(self) -> None:
        """All trajectories of this copy have ended. The writer stays until it has everybody's."""
        if not parallel.is_writer():
            if _leads():
                self._send(None)
            return
        while self._received:
            self._receive()
            if self._received:
                time.sleep(_POLL_SECONDS)

    def _send(self, letter: Trajectory | None) -> None:
        _store().set(self._key(self._generator, self._sent), written(letter))
        self._sent += 1

    def _receive(self) -> None:
        """Deliver what has come; copies that have sent their last letter are crossed out."""
        for generator in list(self._received):
            for letter in self._letters(generator):
                activity.advance()
                if letter is None:
                    del self._received[generator]
                else:
                    self._deliver(letter)
        self._looked = time.monotonic()

    def _letters(self, generator: int) -> Iterator[Trajectory | None]:
        store = _store()
        while generator in self._received:
            key = self._key(generator, self._received[generator])
            if not store.check([key]):
                return
            letter = read(store.get(key))
            store.delete_key(key)
            self._received[generator] += 1
            yield letter

    def _key(self, generator: int, number: int) -> str:
        return f"{self._name}/{generator}/{number}"


def written(letter: Trajectory | None) -> str:
    """A letter as JSON: whoever reaches the store may write to it, so it holds data only."""
    return json.dumps(None if letter is None else asdict(letter))


def read(text: bytes) -> Trajectory | None:
    """The letter of a text. RunError: no rank of this run wrote it."""
    try:
        fields = json.loads(text)
        if fields is None:
            return None
        return Trajectory(**{**fields, "prompt": Prompt(**fields["prompt"])})
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"the ranks' store holds a response that none of them wrote ({error}); start again at "
            "another MASTER_PORT, which strangers cannot reach"
        ) from error


def _leads() -> bool:
    """True on one rank of each copy of the model."""
    return parallel_state.get_tensor_model_parallel_rank() == 0 and parallel.is_first_stage()


def _store() -> Any:
    """The store of the process group."""
    return dist.distributed_c10d._get_default_store()
