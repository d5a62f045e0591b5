"""ZebraLogic in grid mode: 1,000 puzzles of 2x2 to 6x6; every cell must be right."""

import json
from typing import Any

from evaluation.grading.house_grid import first_object, houses_of, last_grid, solves
from evaluation.tasks.published import PublishedTask
from evaluation.tasks.task import Grade, Row


class ZebraLogic(PublishedTask):
    """Rows ``{"question" with its JSON instruction, "ground_truth_answer": the grid}``.

    The grid is ``{"header": [...], "rows": [[house, value, ...], ...]}``, as JSON text or object.
    The paper's verdict reads the response's first fence, the strict one its last JSON with houses.
    """

    name = "ZebraLogic"
    file = "ZebraLogic.json"

    def problem_of_reference(self, row: Row) -> str | None:
        grid = _grid(row)
        if not isinstance(grid, dict) or not grid.get("header") or not grid.get("rows"):
            return "'ground_truth_answer' must hold header and rows; use the published file"
        if not isinstance(grid["header"], list) or not isinstance(grid["rows"], list):
            return "'ground_truth_answer' must hold lists; use the published file"
        if any(not isinstance(c, list) or len(c) != len(grid["header"]) for c in grid["rows"]):
            return "'ground_truth_answer' has rows of another length than its header; correct it"
        return None

    def division(self, row: Row) -> str | None:
        grid = _grid(row)
        return f"{len(grid['rows'])}x{len(grid['header']) - 1}"

    def grade(self, row: Row, response: str) -> Grade:
        reference, found = _grid(row), first_object(response)
        houses = houses_of(found) if found is not None else None
        return Grade(
            correct=solves(found, reference),
            extracted=json.dumps(found, ensure_ascii=False) if houses is not None else None,
            flags=[] if houses is not None else ["no_answer"],
            strict=solves(last_grid(response), reference),
        )


def _grid(row: Row) -> Any:
    answer = row.get("ground_truth_answer")
    if not isinstance(answer, str):
        return answer
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None
