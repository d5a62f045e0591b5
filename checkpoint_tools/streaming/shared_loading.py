"""Several runs of one model whose weights do not fit into memory at once: every part's weights are
brought in once, for all runs.

The runs are threads. Each stops where it needs the next part; when all have arrived there, the part
is loaded, and all go on. They go through the parts in the same order, so those that are still
running always wait for the same one.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class SharedLoading:
    """Where the runs meet. Without ``run`` there is one of them: the caller."""

    def __init__(self) -> None:
        self._runs, self._waiting, self._round = 1, 0, 0
        self._load: Callable[[], None] = lambda: None
        self._problem: BaseException | None = None
        self._changed = threading.Condition()

    def arrive(self, load: Callable[[], None]) -> None:
        """Wait until every run needs the next part; one of them calls ``load``.

        Raises what ``load`` raises, in every run.
        """
        with self._changed:
            self._load = load
            self._waiting += 1
            this = self._round
            if self._waiting == self._runs:
                self._go_on()
            while self._round == this:
                self._changed.wait()
            if self._problem is not None:
                raise self._problem

    def run(self, functions: Sequence[Callable[[], Result]]) -> list[Result]:
        """Run all functions side by side; results in their order. Raises what the first raised."""
        self._runs, self._waiting, self._problem = len(functions), 0, None
        with ThreadPoolExecutor(max_workers=len(functions)) as threads:
            futures = [threads.submit(self._one, function) for function in functions]
        self._runs = 1
        return [future.result() for future in futures]

    def _one(self, function: Callable[[], Result]) -> Result:
        try:
            return function()
        finally:
            with self._changed:
                self._runs -= 1  # it needs no further part: the others need not wait for it
                if self._runs and self._waiting == self._runs:
                    self._go_on()

    def _go_on(self) -> None:
        try:
            self._load()
        except BaseException as problem:  # the run that loads is not always the one that asked
            self._problem = problem
        self._waiting = 0
        self._round += 1
        self._changed.notify_all()
