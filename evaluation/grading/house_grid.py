"""ZebraLogic: the grid of houses in a response, cell by cell against the reference.

The response holds JSON, ``{"solution": {"House 1": {"Name": "Eric", ...}, ...}}``, in a fence or
bare. The paper's rule reads the first fence, so a draft in a fence shadows what follows it; the
strict rule reads the last JSON object that holds houses.
"""

import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

Grid = dict[str, Any]

_FENCE = "```"
_LABEL = re.compile(r"#?\d+")  # a house's key where it is only numbered
_OBJECT = re.compile(r'\{(?=\s*+["}])')  # a brace that may open a JSON object
# What no grid is: a decoder goes as deep as the process lets it, again from every brace.
_DEEP = re.compile(r'(?:[{\[]\s*+(?:"[^"\\]{0,200}+"\s*+:\s*+)?+){32}')
_DECODER = json.JSONDecoder()


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
    """The last JSON object of a response in which houses can be found; None when none has any.

    Braces that open no JSON, as those of a set or of a draft that breaks off, are passed over.
    """
    grids = (read for read in _objects(response) if houses_of(read) is not None)
    return next(iter(deque(grids, maxlen=1)), None)


def houses_of(grid: Grid) -> Grid | None:
    """House label -> its attributes, from any of the accepted shapes; None for another object."""
    solution = grid.get("solution")
    if isinstance(solution, dict):
        return solution
    if isinstance(solution, list):
        return {f"House {place}": house for place, house in enumerate(solution, start=1)}
    return grid if any(_names_house(key, house) for key, house in grid.items()) else None


def _names_house(key: str, house: object) -> bool:
    """Whether a top-level entry is a house: it says so, or is a number with attributes."""
    return "house" in key.lower() or (_LABEL.fullmatch(key) is not None and isinstance(house, dict))


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
    except (ValueError, RecursionError):  # ValueError: no JSON, or a number of 4,300 digits
        return None
    return read if isinstance(read, dict) else None


def _objects(text: str) -> Iterator[Grid]:
    """Every JSON object of a text that lies in no other one."""
    end = 0
    for brace in _OBJECT.finditer(text):
        if brace.start() < end or _DEEP.match(text, brace.start()):
            continue
        try:
            read, end = _DECODER.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        yield read


def _balanced(text: str) -> Iterator[str]:
    """Stretches from an outermost ``{`` to its ``}``; braces inside strings do not count."""
    depth, start, in_string, escaped = 0, 0, False, False
    for place, character in enumerate(text):
        if escaped:
            escaped = False
        elif in_string:
            escaped, in_string = character == "\\", character != '"'
        elif depth and character == '"':
            in_string = True
        elif character == "{":
            start = start if depth else place
            depth += 1
        elif character == "}" and depth:
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
