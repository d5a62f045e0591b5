"""A progress bar in bytes, on the first process only, and only where someone watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What the writers tell how far they are."""

    def update(self, n: int) -> object:
        """``n`` more bytes of weights are written."""


@contextmanager
def progress_bar(what: str, total: int, *, shown: bool) -> Iterator[Progress]:
    """A bar over ``total`` bytes on standard error, unless that is no terminal or not ``shown``."""
    from tqdm import tqdm

    hidden = not (shown and sys.stderr.isatty())
    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=hidden) as bar:
        yield bar
