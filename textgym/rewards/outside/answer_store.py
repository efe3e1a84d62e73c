"""What people said about texts, in an SQLite file.

The store knows nothing of how people are asked. Each answer is a row that is written when it is given, in a
transaction of its own; several processes may share a file. An answer that can't be written, because the file is locked
or damaged or the disk is full, goes into a file beside it, ``<name>.unsaved-<id>.jsonl``, and from there into the store
the next time it can be read: nothing that a person said is lost.

Texts are kept exactly, as UTF-8 bytes in which lone surrogates are encoded like any other character.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from textgym.checks import check_bool, check_number, check_path, shown

# The order of what is compared is not kept: whoever asks shows both in an order of its own.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS scores (
    id TEXT PRIMARY KEY, prompt BLOB NOT NULL, completion BLOB NOT NULL, score REAL NOT NULL, time REAL NOT NULL);
CREATE TABLE IF NOT EXISTS comparisons (
    id TEXT PRIMARY KEY, prompt BLOB NOT NULL, chosen BLOB NOT NULL, rejected BLOB NOT NULL, tie INTEGER NOT NULL,
    time REAL NOT NULL);
CREATE INDEX IF NOT EXISTS scores_by_text ON scores (prompt, completion);
CREATE INDEX IF NOT EXISTS comparisons_by_chosen ON comparisons (prompt, chosen);
CREATE INDEX IF NOT EXISTS comparisons_by_rejected ON comparisons (prompt, rejected);
"""
_INSERTS = {
    "scores": "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?, ?)",
    "comparisons": "INSERT OR IGNORE INTO comparisons VALUES (?, ?, ?, ?, ?, ?)",
}


class AnswerStoreError(RuntimeError):
    """The file of answers can't be read or written."""


class AnswerStore:
    """Scores and comparisons of texts, remembered in an SQLite file.

        >>> import tempfile
        >>> store = AnswerStore(tempfile.mkdtemp() + "/answers.sqlite")
        >>> store.add_score("the film is", " warm", 0.5)
        >>> store.add_comparison("the film is", " warm", " dull")
        >>> store.score("the film is", " warm"), store.score("the film is", " dull")
        (0.5, None)
        >>> store.preference("the film is", " warm"), store.preference("the film is", " dull")
        (1.0, -1.0)
        >>> store.export_preferences(store.path.with_name("preferences.jsonl"))
        1

    :param path: the file; made with its folders if it does not exist
    :param timeout: how long to wait for another process that is writing, in seconds
    :raises AnswerStoreError: if the file is not such a store, is damaged, or stays locked
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = 5.0) -> None:
        self.path = check_path("path", path)
        self.timeout = check_number("timeout", timeout, low=0.0, unit="seconds")
        self._unsaved = False  # whether an answer of this process waits beside the file
        with self._refusals("open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connection() as connection:
                connection.executescript(_SCHEMA)
        self._recover()

    # What is known

    def score(self, prompt: str, completion: str) -> float | None:
        """The mean of the scores given to a text; None where it has none."""
        return self.scores([(prompt, completion)])[0]

    def scores(self, texts: Sequence[tuple[str, str]]) -> list[float | None]:
        """:meth:`score` of pairs of prompt and completion."""
        return self._means("SELECT score FROM scores WHERE prompt = ? AND completion = ?", texts)

    def preference(self, prompt: str, completion: str) -> float | None:
        """Wins minus defeats over all comparisons of a text, in [-1, 1]; None where it was never compared."""
        return self.preferences([(prompt, completion)])[0]

    def preferences(self, texts: Sequence[tuple[str, str]]) -> list[float | None]:
        """:meth:`preference` of pairs of prompt and completion."""
        return self._means(
            "SELECT 1 - tie FROM comparisons WHERE prompt = ?1 AND chosen = ?2 "
            "UNION ALL SELECT tie - 1 FROM comparisons WHERE prompt = ?1 AND rejected = ?2",
            texts,
        )

    def counts(self) -> dict[str, int]:
        """How many scores and comparisons there are."""
        with self._refusals("read"), self._connection() as connection:
            return {table: connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in _INSERTS}

    # Answers

    def add_score(self, prompt: str, completion: str, score: float) -> None:
        """Remember a score.

        :raises TypeError: if it is not a number, or prompt or completion is not a text
        :raises ValueError: if it is not finite
        :raises AnswerStoreError: if it can't be written; it is then in a file beside the store
        """
        texts = [_text_given("prompt", prompt), _text_given("completion", completion)]
        self._add("scores", texts, [check_number("score", score)])

    def add_comparison(self, prompt: str, chosen: str, rejected: str, tie: bool = False) -> None:
        """Remember which of two completions of a prompt is the better one.

        :param tie: neither is
        :raises AnswerStoreError: as :meth:`add_score`
        """
        given = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        texts = [_text_given(name, text) for name, text in given.items()]
        self._add("comparisons", texts, [int(check_bool("tie", tie))])

    # Exports

    def export_scores(self, path: str | os.PathLike[str]) -> int:
        """Write ``{"text", "score"}`` a line, one for each text (prompt and completion), with the mean of its scores.

        :return: how many lines
        """
        rows = self._rows(
            "SELECT prompt, completion, AVG(score) FROM scores GROUP BY prompt, completion ORDER BY MIN(rowid)"
        )
        return _write_lines(path, ({"text": prompt + completion, "score": score} for prompt, completion, score in rows))

    def export_preferences(self, path: str | os.PathLike[str], from_scores: bool = False) -> int:
        """Write ``{"prompt", "chosen", "rejected"}`` a line, one for each comparison that was not a tie.

        :param from_scores: also one for any two scored completions of a prompt whose mean scores differ, with their
            difference as ``"margin"``
        :return: how many lines
        """
        compared = self._rows("SELECT prompt, chosen, rejected FROM comparisons WHERE NOT tie ORDER BY rowid")
        lines: list[dict[str, Any]] = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in compared]
        if from_scores:
            scored: dict[str, list[tuple[str, float]]] = {}
            for prompt, completion, score in self._rows(
                "SELECT prompt, completion, AVG(score) FROM scores GROUP BY prompt, completion ORDER BY MIN(rowid)"
            ):
                scored.setdefault(prompt, []).append((completion, score))
            for prompt, known in scored.items():
                for i, (first, a) in enumerate(known):
                    for second, b in known[i + 1 :]:
                        if a != b:
                            chosen, rejected = (first, second) if a > b else (second, first)
                            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": abs(a - b)}
                            lines.append(pair)
        return _write_lines(path, lines)

    # SQLite

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction; none is kept, so that threads and forked processes may share the store."""
        with closing(sqlite3.connect(self.path, timeout=self.timeout)) as connection, connection:
            yield connection

    @contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise AnswerStoreError(f"can't {what} the answers in {self.path}: {error}{self._advice(error)}") from error

    def _advice(self, error: Exception) -> str:
        text = str(error)
        if "locked" in text:
            return f"; another process has been writing for {self.timeout:g} s: end it, or give a longer timeout="
        if "malformed" in text or "not a database" in text:
            return (
                "; it is left as it is: move it away to begin a new one, or get back what `sqlite3 FILE .recover` can"
            )
        return ""

    def _rows(self, query: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with self._refusals("read"), self._connection() as connection:
            rows = connection.execute(query, parameters).fetchall()
        return [tuple(_text(value) if isinstance(value, bytes) else value for value in row) for row in rows]

    def _means(self, query: str, texts: Sequence[tuple[str, str]]) -> list[float | None]:
        if self._unsaved:
            self._recover()
        means: list[float | None] = []
        with self._refusals("read"), self._connection() as connection:
            for text in texts:
                values = [value for (value,) in connection.execute(query, tuple(map(_blob, text)))]
                means.append(sum(values) / len(values) if values else None)
        return means

    def _add(self, table: str, texts: list[str], numbers: list[float]) -> None:
        answer = [uuid.uuid4().hex, *texts, *numbers, time.time()]
        try:
            with self._refusals("write"):
                self._insert([(table, answer)])
        except AnswerStoreError as error:
            try:
                beside = self._put_beside(table, answer)
            except OSError as second:
                raise AnswerStoreError(f"{error}; nor can it be written beside it ({second}): {answer}") from error
            self._unsaved = True
            raise AnswerStoreError(f"{error}; the answer is kept in {beside} until the store can be used") from error

    def _insert(self, answers: Iterable[tuple[str, list[Any]]]) -> None:
        with self._connection() as connection:
            for table, answer in answers:
                values = [answer[0], *(_blob(v) if isinstance(v, str) else v for v in answer[1:])]
                connection.execute(_INSERTS[table], values)

    def _put_beside(self, table: str, answer: list[Any]) -> Path:
        beside = self.path.with_name(f"{self.path.name}.unsaved-{answer[0]}.jsonl")
        _write_lines(beside, [{"table": table, "answer": answer}])
        return beside

    def _recover(self) -> None:
        """Take in answers that could not be written before. Each has an id, so that none is taken in twice."""
        for beside in sorted(self.path.parent.glob(f"{_escaped(self.path.name)}.unsaved-*.jsonl")):
            with self._refusals("write"):
                try:
                    lines = [json.loads(line) for line in beside.read_text(encoding="utf-8").splitlines()]
                    answers = [(line["table"], line["answer"]) for line in lines]
                except (ValueError, KeyError, TypeError) as error:
                    raise AnswerStoreError(f"{beside} has no answers in the form they are kept in: {error}") from error
                self._insert(answers)
                beside.unlink(missing_ok=True)
        self._unsaved = False


def _text_given(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)} must be a text (str)")
    return value  # lone surrogates are kept, too


def _blob(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(blob: bytes) -> str:
    return blob.decode("utf-8", "surrogatepass")


def _escaped(name: str) -> str:
    """A file name as a pattern that matches it only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _write_lines(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON lines, all of them or none; lone surrogates are escaped as everything beyond ASCII is."""
    path = Path(path)
    number = 0
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
                number += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return number
