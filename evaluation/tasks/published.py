"""What the published data files have in common: JSON lists whose rows hold a question."""

from evaluation.tasks.task import Row, Task


class PublishedTask(Task):
    """A task of the paper. Keys of a row that are not read here are left alone."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls) and "how_to_get" not in vars(cls):
            cls.how_to_get = (
                f"fetch it: python -m evaluation.download --data DIR --tasks {cls.name}"
            )

    def problem_of(self, row: Row) -> str | None:
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            return "needs the text 'question'; use the published file"
        return self.problem_of_reference(row)

    def problem_of_reference(self, row: Row) -> str | None:
        """What is wrong with what a row is graded against, as ``rule; remedy``."""
        raise NotImplementedError

    def question(self, row: Row) -> str:
        """The text of the user's turn: the only message, without examples or a system message."""
        return row["question"]

    def prompt(self, row: Row) -> Row:
        return {"messages": [{"role": "user", "content": self.question(row)}]}
