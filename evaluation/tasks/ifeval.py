"""IFEval: 541 prompts with instructions that a program can check."""

from pathlib import Path

from evaluation.grading.instructions import (
    check_instructions,
    known_instructions,
    missing_packages,
    use_nltk_data,
)
from evaluation.tasks.published import PublishedTask
from evaluation.tasks.task import Grade, Row
from megatron_opdlm.errors import InputError


class IFEval(PublishedTask):
    """Rows ``{"question", "key", "instruction_id_list", "kwargs"}``.

    A response is correct when it keeps all instructions as it is (prompt level, strict). The scores
    ``loose`` (prompt level) and ``instruction`` (share of the instructions kept, strict, over all
    instructions of all rows) are reported beside it.
    """

    name = "IFEval"
    file = "IFEval.json"

    def load(self, data_dir: Path) -> list[Row]:
        rows = super().load(data_dir)
        if not missing_packages():
            use_nltk_data(data_dir / "nltk_data")
            self._check_instructions(rows, data_dir)
        return rows

    def _check_instructions(self, rows: list[Row], data_dir: Path) -> None:
        """InputError for an instruction that lm_eval does not know."""
        known = known_instructions()
        for index, row in enumerate(rows):
            unknown = sorted(set(row["instruction_id_list"]) - known)
            if unknown:
                raise InputError(
                    f"task {self.name}: {self.path(data_dir)}: row {index}: instruction "
                    f"{unknown[0]!r} is not known to lm_eval; use the published file"
                )

    def missing(self, rows: list[Row]) -> str | None:
        lacks = missing_packages()
        if lacks:
            return (
                f"its checkers need {', '.join(lacks)}, which is not installed; run launch/setup.sh"
            )
        return None

    def problem_of_reference(self, row: Row) -> str | None:
        ids, arguments = row.get("instruction_id_list"), row.get("kwargs")
        if not isinstance(ids, list) or not ids or not all(isinstance(i, str) for i in ids):
            return "needs 'instruction_id_list', a list of texts; use the published file"
        if not isinstance(arguments, list) or len(arguments) != len(ids):
            return "needs 'kwargs', a list with one object an instruction; use the published file"
        if not all(each is None or isinstance(each, dict) for each in arguments):
            return "'kwargs' must hold objects; use the published file"
        if type(row.get("key")) is not int:
            return "needs 'key', a whole number; use the published file"
        return None

    def grade(self, row: Row, response: str) -> Grade:
        verdict = check_instructions(
            row["question"], row["instruction_id_list"], row["kwargs"], response, key=row["key"]
        )
        flags = ["sentences_approximate"] if verdict.approximate else []
        if verdict.timed_out:
            flags.append("scorer_timeout")
        if not response.strip():
            flags.append("no_answer")
        return Grade(
            correct=all(verdict.strict),
            extracted=response if response.strip() else None,
            flags=flags,
            scores={
                "loose": float(all(verdict.loose)),
                "instruction": sum(verdict.strict) / len(verdict.strict),
            },
            weights={"instruction": len(verdict.strict)},
        )
