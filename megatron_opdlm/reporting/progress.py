"""How far long work is: a bar with the time left on a terminal, else a line now and then, both on
standard error. All long work tells it here.
"""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 30.0  # between lines where nobody watches
BYTES = "B"  # the unit of data, shown in GB
_LEFT = "minutes left"


class Progress:
    """Counts what is done and, where there are any, its tokens; rates and the time left are of this
    process. Use as a context manager, or ``close`` it. Not shown: it counts silently.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, *, show: bool, unit: str = "response"
    ) -> None:
        self._name, self._total, self._done, self._before = name, total, done, done
        self._tokens, self._note, self._unit = 0, "", unit
        self._start = time.monotonic()
        self._spoken, self._show = self._start, show
        self._bar = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=name,
                unit=unit,
                unit_scale=unit == BYTES,
                dynamic_ncols=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def advance(self, tokens: int = 0, count: int = 1, note: str = "") -> None:
        """``count`` more are done, of this many tokens together. ``note``: figures to watch."""
        self._done += count
        self._tokens += tokens
        self._note = note or (f"{self._rate():,.0f} tokens/s" if self._tokens else "")
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif self._show and time.monotonic() - self._spoken >= LINE_SECONDS:
            self._spoken = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """As ``GSM8K: 120 of 1319 responses, 350 tokens/s, 2.1 minutes left``."""
        made = self._done - self._before
        left = (self._total - self._done) * self._seconds() / max(made, 1) / 60
        note = f"{self._note}, " if self._note else ""
        return f"{self._name}: {self._amount()}, {note}{left:.1f} {_LEFT}"

    def _amount(self) -> str:
        if self._unit == BYTES:
            return f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        return f"{self._done} of {self._total} {self._unit}s"

    def _rate(self) -> float:
        return self._tokens / self._seconds()

    def _seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-6)


def say(line: str) -> None:
    """Print a result: above the bar, where there is one."""
    tqdm.write(line)
    sys.stdout.flush()


def last_line(text: str) -> str:
    """The last line in a program's output that says how far it is; empty: there is none."""
    return next((line for line in reversed(text.splitlines()) if line.endswith(_LEFT)), "")
