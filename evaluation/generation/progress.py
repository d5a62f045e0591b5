"""How far a generation or a grading is: a bar on a terminal, else a line now and then."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 30.0  # between lines where nobody watches


class Progress:
    """Counts finished responses and, where they have any, their tokens; rates and the time left are
    of this process. Use as a context manager. Not shown: it counts silently.
    """

    def __init__(self, name: str, total: int, done: int, *, show: bool) -> None:
        self._name, self._total, self._done, self._before = name, total, done, done
        self._tokens, self._start = 0, time.monotonic()
        self._spoken, self._show = self._start, show
        self._bar = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=name, unit="response", dynamic_ncols=True
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, tokens: int = 0, responses: int = 1) -> None:
        """More responses, of this many tokens together."""
        self._done += responses
        self._tokens += tokens
        if self._bar is not None:
            if self._tokens:
                self._bar.set_postfix_str(self._rate(), refresh=False)
            self._bar.update(responses)
        elif self._show and time.monotonic() - self._spoken >= LINE_SECONDS:
            self._spoken = time.monotonic()
            print(self.line(), flush=True)

    def line(self) -> str:
        """As ``GSM8K: 120 of 1319 responses, 350 tokens/s, 2.1 minutes left``."""
        made = self._done - self._before
        left = (self._total - self._done) * self._seconds() / max(made, 1) / 60
        rate = f"{self._rate()}, " if self._tokens else ""
        return (
            f"{self._name}: {self._done} of {self._total} responses, {rate}{left:.1f} minutes left"
        )

    def _rate(self) -> str:
        return f"{self._tokens / self._seconds():,.0f} tokens/s"

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-6)
