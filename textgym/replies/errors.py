"""What is raised when a reply cannot be used."""

from __future__ import annotations


class ReplyError(Exception):
    """A reply raised an exception or returned something that is not one text for each row that waits for one.

    :param reply: the reply's name
    :param problem: what was wrong, and what would be right
    :param row: the row it happened in; None when it concerns all
    """

    def __init__(self, reply: str, problem: str, *, row: int | None = None) -> None:
        super().__init__(reply, problem)
        self.reply = reply
        self.problem = problem
        self.row = row

    def __str__(self) -> str:
        where = "" if self.row is None else f", row {self.row}"
        return f"reply {self.reply!r}{where}: {self.problem}"
