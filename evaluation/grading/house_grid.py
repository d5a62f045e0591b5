"""ZebraLogic: the grid of houses in a response, cell by cell against the reference.

The response holds JSON, ``{"solution": {"House 1": {"Name": "Eric", ...}, ...}}``, in a fence or
bare. The paper's rule reads the first fence, so a draft in a fence shadows what follows it; the
strict rule reads the last JSON object that holds houses.
"""

import json
from collections.abc import Iterator
from typing import Any

Grid = dict[str, Any]

_FENCE = "```"


def first_object(response: str) -> Grid | None:
    """The object that the paper reads: the first ```` ```json ```` fence, else the first fence,
    else the first balanced braces. A fence that is no JSON is passed over.
    """
    for marker in (_FENCE + "json", _FENCE):
        _, found, rest = response.partition(marker)
        read = _object(rest.partition(_FENCE)[0]) if found else None
        if read is not None:
            return read
    return _object(next(_balanced(response), ""))


def last_grid(response: str) -> Grid | None:
    """The last JSON object of a response in which houses can be found; None when none has any."""
    grids = [read for text in _balanced(response) if (read := _object(text)) is not None]
    return next((grid for grid in reversed(grids) if houses_of(grid) is not None), None)


def houses_of(grid: Grid) -> Grid | None:
    """House label -> its attributes, from any of the accepted shapes; None for another object."""
    solution = grid.get("solution")
    if isinstance(solution, dict):
        return solution
    if isinstance(solution, list):
        return {f"House {place}": house for place, house in enumerate(solution, start=1)}
    return grid if any("house" in key.lower() for key in grid) else None


def solves(grid: Grid | None, reference: Grid) -> bool:
    """Whether every cell of the reference is in the response's grid; case and outer space apart.

    ``reference``: ``{"header": ["House", attribute, ...], "rows": [["1", value, ...], ...]}``.
    """
    houses = houses_of(grid) if grid is not None else None
    if houses is None:
        return False
    attributes = reference["header"][1:]
    for label, *cells in reference["rows"]:
        house = _house(houses, str(label))
        if house is None:
            return False
        for attribute, cell in zip(attributes, cells, strict=True):
            if _cell(_value(house, attribute)) != _cell(cell):
                return False
    return True


def _house(houses: Grid, label: str) -> Grid | None:
    """The house of a label, however the response spells its key."""
    spellings = (
        *(f"House {label}", f"house {label}", f"House{label}", f"house_{label}"),
        *(label, f"#{label}"),
    )
    keys = [key for key in spellings if isinstance(houses.get(key), dict)]
    keys += [key for key, house in houses.items() if label in key and isinstance(house, dict)]
    return houses[keys[0]] if keys else None


def _value(house: Grid, attribute: str) -> object:
    """The value of an attribute: names are compared by their letters and digits, then by part."""
    plain = {_plain(key): value for key, value in house.items()}
    wanted = _plain(attribute)
    if wanted in plain:
        return plain[wanted]
    return next((plain[key] for key in plain if key and (wanted in key or key in wanted)), None)


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _cell(value: object) -> str | None:
    return None if value is None else str(value).strip().lower()


def _object(text: str) -> Grid | None:
    try:
        read = json.loads(text.strip())
    except (json.JSONDecodeError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def _balanced(text: str) -> Iterator[str]:
    """Stretches from an outermost ``{`` to its ``}``; braces inside strings do not count."""
    depth, start, in_string, escaped = 0, 0, False, False
    for place, character in enumerate(text):
        if escaped:
            escaped = False
        elif depth and character == "\\":
            escaped = True
        elif depth and character == '"':
            in_string = not in_string
        elif in_string:
            continue
        elif character == "{":
            start = start if depth else place
            depth += 1
        elif character == "}" and depth:
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
