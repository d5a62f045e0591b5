"""Which pages of the key/value cache belong to which slot: the host's side of paged storage."""

import numpy as np


class Pages:
    """Hands out pages of ``page_tokens`` positions to slots, and takes them back."""

    def __init__(self, pages: range, slots: int, page_tokens: int, positions: int) -> None:
        """``pages``: those to hand out; the last one is scratch, behind the last slot of the table.
        ``positions``: of the longest sequence.
        """
        self.page_tokens = page_tokens
        self.free = list(pages[:-1])[::-1]
        # Page of each piece of a slot's positions; what it does not hold points at scratch.
        width = -(-positions // page_tokens)
        self.table = np.full((slots + 1, width), pages[-1], dtype=np.int64)
        self.held = np.zeros(slots, dtype=np.int64)
        self.covered = np.zeros(slots, dtype=np.int64)  # positions that these have room for
        self.changed = False  # since the device was last told

    def needed(self, positions: int) -> int:
        """Pages for that many positions."""
        return -(-positions // self.page_tokens)

    def missing(self, positions: np.ndarray) -> np.ndarray:
        """Pages that each slot [S] lacks to hold so many positions [S]; at most what it can use."""
        return np.maximum(-(-positions // self.page_tokens) - self.held, 0)

    def give(self, slot: int, pages: int) -> None:
        """Add free pages to a slot."""
        held = int(self.held[slot])
        for place in range(held, held + pages):
            self.table[slot, place] = self.free.pop()
        self.held[slot] = held + pages
        self.covered[slot] = (held + pages) * self.page_tokens
        self.changed = True

    def take_back(self, slot: int) -> None:
        """All pages of a slot are free again."""
        held = self.held[slot]
        self.free.extend(self.table[slot, :held][::-1].tolist())
        self.table[slot] = self.table[-1]
        self.held[slot] = self.covered[slot] = 0
