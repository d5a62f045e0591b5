"""What the doctor found: a line each, with the remedy."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line. ``remedy`` is empty where nothing needs to be done."""

    name: str  # what was examined
    text: str  # what was found
    remedy: str = ""
    breaks: bool = False  # a run would fail, or compute something else

    def __str__(self) -> str:
        level = "breaks" if self.breaks else "note" if self.remedy else "ok"
        tail = f"; {self.remedy}" if self.remedy else ""
        return f"{level:<7} {self.name:<15} {self.text}{tail}"
