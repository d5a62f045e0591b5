"""DAPO-Math-17k as it is published: a Parquet file in which each of some 17,000 problems stands
about a hundred times, as a list of messages, between two instructions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opdlm.data.rows import Row
from megatron_opdlm.errors import InputError

# The first and the last paragraph of a message ask for an answer behind "Answer:".
_BEFORE, _AFTER = "Solve the following math problem", "Remember to put your answer"
_COLUMNS = ("prompt", "reward_model")


def is_dapo(path: Path) -> bool:
    """Whether a file is DAPO-Math-17k's: Parquet with its two columns, the first prompt between its
    instructions. Other files for verl have the columns, too.
    """
    if path.suffix != ".parquet" or not path.is_file():
        return False
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError):
        return False
    there = set(_COLUMNS) <= set(schema.names)
    if not there or not pyarrow.types.is_list(schema.field("prompt").type):
        return False
    first = next(_values(path), {"prompt": None})["prompt"]
    text = first[-1].get("content") if first and isinstance(first[-1], dict) else None
    return isinstance(text, str) and text.strip().startswith(_BEFORE)


def dapo_rows(path: Path, option: str) -> list[Row]:
    """``{"question", "ground_truth_answer"}`` of each problem once, in the file's order, without
    the instructions. InputError: file, row and rule.
    """
    rows, seen = [], set()
    for number, value in enumerate(_values(path), start=1):
        place = f"{option}={path}: row {number}"
        question, answer = _question(value["prompt"], place), _answer(value["reward_model"], place)
        if question not in seen:
            seen.add(question)
            fields = {"question": question, "ground_truth_answer": answer}
            rows.append(Row(index=len(rows), place=place, fields=fields))
    if not rows:
        raise InputError(f"{option}={path}: the file holds no rows; fetch it again")
    return rows


def _values(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=list(_COLUMNS)):
        yield from batch.to_pylist()


def _question(messages: Any, place: str) -> str:
    text = messages[-1].get("content") if messages else None
    paragraphs = text.strip().split("\n\n") if isinstance(text, str) else []
    if (
        len(paragraphs) < 3
        or not paragraphs[0].startswith(_BEFORE)
        or not paragraphs[-1].startswith(_AFTER)
    ):
        raise InputError(
            f"{place}: 'prompt' is not a problem between the two instructions of DAPO-Math-17k; "
            "use the published file"
        )
    return "\n\n".join(paragraphs[1:-1]).strip()


def _answer(reward: Any, place: str) -> str:
    answer = (reward or {}).get("ground_truth")
    if not isinstance(answer, str) or not answer.strip():
        raise InputError(f"{place}: 'reward_model' has no 'ground_truth'; use the published file")
    return answer.strip()
