"""A person as the reward: asked in the terminal, remembered in a file."""

from __future__ import annotations

import math
import os
import sys
import warnings
import zlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol, TextIO, get_args

import numpy as np

from textgym.checks import check_choice, check_int, check_number
from textgym.rewards.base import Reward, potentials_of, prefix_potentials_of
from textgym.rewards.columns import rows_of_columns
from textgym.rewards.errors import RewardError
from textgym.rewards.function_reward import RewardLike, check_reward
from textgym.rewards.outside.answer_store import AnswerStore, AnswerStoreError
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import as_list, scores_of, wanted_per_row

HumanMode = Literal["score", "compare"]
Choice = Literal["first", "second", "tie"]


class Asker(Protocol):
    """How a person is asked. ``None`` is "I'd rather not say"; EOFError ends the questions."""

    def score(self, prompt: str, completion: str) -> float | None:
        """How good a completion is."""

    def compare(self, prompt: str, first: str, second: str) -> Choice | None:
        """Which of two completions is the better one."""


class TerminalAsker:
    """Asks in the terminal, or through any pair of text streams.

    Characters that a terminal would obey, such as escape sequences, are shown as escapes: what a policy writes must not
    move the cursor. An answer that makes no sense is asked for again; an empty one skips the text; the end of the input
    (Ctrl-D) ends the questions.

        >>> import io
        >>> person, screen = io.StringIO("very good\\n0.5\\n"), io.StringIO()
        >>> TerminalAsker(input=person, output=screen).score("the film is", " warm")
        0.5
        >>> print(screen.getvalue().splitlines()[1])
        the film is[ warm]

    :param low: the worst score
    :param high: the best score
    :param input: where answers are read; default standard input
    :param output: where questions are written; default standard error, so that standard output stays clean
    :raises ValueError: if low is not below high, or one of them not finite
    """

    def __init__(
        self, low: float = -1.0, high: float = 1.0, input: TextIO | None = None, output: TextIO | None = None
    ) -> None:
        if check_number("low", low) >= check_number("high", high):
            raise ValueError(f"low={low} must be less than high={high}")
        self.low = low
        self.high = high
        self._input = input
        self._output = output

    def score(self, prompt: str, completion: str) -> float | None:
        self._say(f"\n{_printable(prompt)}[{_printable(completion)}]")
        while True:
            answer = self._answer(f"Score from {self.low:g} to {self.high:g} (empty to skip): ")
            if not answer:
                return None
            try:
                score = float(answer)
            except ValueError:
                self._say(f"{_printable(answer)!r} is not a number.")
                continue
            if self.low <= score <= self.high:
                return score
            self._say(f"{score:g} is not between {self.low:g} and {self.high:g}.")

    def compare(self, prompt: str, first: str, second: str) -> Choice | None:
        self._say(f"\n{_printable(prompt)}\n  a: [{_printable(first)}]\n  b: [{_printable(second)}]")
        choices: dict[str, Choice | None] = {"a": "first", "b": "second", "=": "tie", "": None}
        while True:
            answer = self._answer("Which is better: a, b or = (empty to skip)? ").lower()
            if answer in choices:
                return choices[answer]
            self._say(f"{_printable(answer)!r} is none of them.")

    def _answer(self, question: str) -> str:
        self._say(question, end="")
        line = (self._input or sys.stdin).readline()
        if not line:
            raise EOFError
        return line.strip()

    def _say(self, text: str, end: str = "\n") -> None:
        output = self._output or sys.stderr
        encoding = output.encoding or "utf-8"
        output.write(text.encode(encoding, "backslashreplace").decode(encoding) + end)
        output.flush()


class HumanReward(Reward):
    """What a person thinks of a text, once asked; another reward where nobody was.

    Answers are kept in an :class:`~textgym.rewards.outside.answer_store.AnswerStore` and replayed: a text is asked
    about once, in this run or any other with the same file. Φ is

    - with ``mode="score"`` the mean of the scores that the text was given, by default in [-1, 1];
    - with ``mode="compare"`` wins minus defeats over its comparisons with other completions of its prompt, in [-1, 1].
      A text can be compared only where another completion of the prompt is known: the last one before it;
    - otherwise the ``fallback``'s score, or None without one. Keep its scale like the answers', for example with
      ``.normalized().clip(-1, 1)``.

    A person is asked about complete texts only: those passed to a call, and in an environment those that ended by
    themselves. With ``ask_about="all"`` every text that is scored is asked about, which suits ``reward_every="end"``,
    and also reaches texts that were cut off by their budget. Everything else, such as the prefixes that pay each token,
    is replayed where it is known and left to the fallback where it isn't.

    Preferences from people as the reward: Christiano et al. 2017, https://arxiv.org/abs/1706.03741.

        >>> import tempfile
        >>> class AlwaysPleased:
        ...     def score(self, prompt, completion):
        ...         print("asked about", completion)
        ...         return 1.0
        >>> human = HumanReward(tempfile.mkdtemp() + "/answers.sqlite", ask=AlwaysPleased())
        >>> human(prompts=["the film is"], completions=[" warm"])
        asked about  warm
        [1.0]
        >>> human(prompts=["the film is"], completions=[" warm"])
        [1.0]

    :param store: the answers, or the path of their file
    :param ask: how to ask, such as :class:`TerminalAsker`; None only replays
    :param mode: ``"score"`` or ``"compare"``
    :param fallback: scores texts that nobody has judged, a reward or a function; with None they are "not applicable"
    :param ask_about: ``"complete"`` or ``"all"``, see above
    :param questions_per_call: most questions in one call; None for no limit
    :raises ValueError: if an argument is impossible
    :raises AnswerStoreError: if the file can't be opened
    """

    def __init__(
        self,
        store: AnswerStore | str | os.PathLike[str],
        ask: Any = None,
        mode: HumanMode = "score",
        fallback: RewardLike | None = None,
        ask_about: Literal["complete", "all"] = "complete",
        questions_per_call: int | None = None,
    ) -> None:
        check_choice("mode", mode, get_args(HumanMode))
        check_choice("ask_about", ask_about, ("complete", "all"))
        if questions_per_call is not None:
            check_int("questions_per_call", questions_per_call, low=0)
        self.store = store if isinstance(store, AnswerStore) else AnswerStore(store)
        self.ask: Asker | None = ask
        self.mode = mode
        self.parts: tuple[Reward, ...] = () if fallback is None else (check_reward("fallback", fallback),)
        self.ask_about = ask_about
        self.questions_per_call = questions_per_call
        self._skipped: set[tuple[str, str]] = set()
        self._last: dict[str, str] = {}  # prompt to the complete text of it seen last

    @property
    def fallback(self) -> Reward | None:
        """What scores texts that nobody has judged."""
        return self.parts[0] if self.parts else None

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        answers = self._answers(prompts, completions, np.ones(len(prompts), dtype=bool))
        unknown = np.flatnonzero(np.isnan(answers)).tolist()
        if unknown and self.fallback is not None:
            answers[unknown] = scores_of(
                self.fallback,
                [prompts[i] for i in unknown],
                [completions[i] for i in unknown],
                rows_of_columns(columns, unknown, len(completions)),
                np.array(unknown),
            )
        return as_list(answers)

    def forget(self, rows: np.ndarray) -> None:
        for part in self.parts:
            part.forget(rows)

    def uncalibrated(self) -> list[Any]:
        return [waiting for part in self.parts for waiting in part.uncalibrated()]

    def state_dict(self) -> dict[str, Any]:
        """The fallback's state. Answers are in their file: a resumed run replays them, whenever they were given."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = state.get("parts", [])
        if len(parts) != len(self.parts):
            raise ValueError(f"reward {self.name!r} has {len(self.parts)} fallbacks, the given state {len(parts)}")
        for part, part_state in zip(self.parts, parts, strict=True):
            part.load_state_dict(part_state)

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        complete = batch.finished | (self.ask_about == "all")
        answers = self._answers(batch.prompts, batch.completions, complete)
        unknown = np.flatnonzero(np.isnan(answers))
        if len(unknown) and self.fallback is not None:
            rest = batch.at(unknown, batch.completion_lengths[unknown])
            answers[unknown] = potentials_of(self.fallback, rest)
        return answers

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        counts = wanted_per_row(batch, at)
        indices = np.repeat(np.arange(len(batch)), counts)  # (K,)
        lengths = np.array([length for row in at for length in row], dtype=np.int64)  # (K,)
        prompts: list[str] = []
        completions: list[str] = []
        finished = np.zeros(len(indices), dtype=bool)
        for start in range(0, len(indices), self.max_batch):
            chunk = slice(start, start + self.max_batch)
            part = batch.at(indices[chunk], lengths[chunk])
            prompts += part.prompts
            completions += part.completions
            finished[chunk] = part.finished
        answers = self._answers(prompts, completions, finished | (self.ask_about == "all"))
        if np.isnan(answers).any() and self.fallback is not None:
            others = np.concatenate([np.zeros(0), *prefix_potentials_of(self.fallback, batch, at)])
            answers = np.where(np.isnan(answers), others, answers)
        return np.split(answers, np.cumsum(counts)[:-1]) if counts else []

    def _answers(self, prompts: list[str], completions: list[str], complete: np.ndarray) -> np.ndarray:
        """What people said of each text ``(N,)``, NaN where nobody did; they are asked about complete ones.

        All known answers are read before anybody is asked: so an answer is given to complete texts at once, and to
        prefixes that read the same from the next call on, whichever way they are scored.
        """
        texts = list(zip(prompts, completions, strict=True))
        try:
            different = list(dict.fromkeys(texts))
            known = dict(zip(different, self._known(different), strict=True))
            answers = np.array([_nan_for_none(known[text]) for text in texts], dtype=np.float64)
            asked: dict[tuple[str, str], float] = {}
            questions = 0
            for text in dict.fromkeys(text for text, whole in zip(texts, complete, strict=True) if whole):
                limit = self.questions_per_call
                if known[text] is None and (limit is None or questions < limit) and self._asks(text):
                    questions += 1
                    asked[text] = _nan_for_none(self._ask(*text))
                self._last[text[0]] = text[1]
        except AnswerStoreError as error:
            raise RewardError(self.name, str(error)) from error
        for i, text in enumerate(texts):
            if complete[i] and text in asked:
                answers[i] = asked[text]
        return answers

    def _known(self, texts: list[tuple[str, str]]) -> list[float | None]:
        return self.store.scores(texts) if self.mode == "score" else self.store.preferences(texts)

    def _asks(self, text: tuple[str, str]) -> bool:
        if self.ask is None or text in self._skipped:
            return False
        return self.mode == "score" or self._last.get(text[0], text[1]) != text[1]

    def _ask(self, prompt: str, completion: str) -> float | None:
        assert self.ask is not None
        try:
            if self.mode == "score":
                score = self.ask.score(prompt, completion)
                if score is not None:
                    self._check(score, completion)
                    self.store.add_score(prompt, completion, score)
            else:
                self._compare(prompt, completion, self._last[prompt])
        except EOFError:
            self.ask = None
            warnings.warn(
                f"reward {self.name!r}: the input has ended, so nobody is asked any more; unknown texts go to "
                f"{'None' if self.fallback is None else self.fallback.name}",
                UserWarning,
                stacklevel=2,
            )
        [known] = self._known([(prompt, completion)])
        if known is None:
            self._skipped.add((prompt, completion))
        return known

    def _compare(self, prompt: str, completion: str, other: str) -> None:
        assert self.ask is not None
        # People prefer what comes first. Which does is a matter of the texts, so that runs can be repeated.
        swap = bool(zlib.crc32((completion + "\0" + other).encode("utf-8", "surrogatepass")) & 1)
        first, second = (other, completion) if swap else (completion, other)
        choice = self.ask.compare(prompt, first, second)
        if choice is None:
            return
        if choice not in get_args(Choice):
            raise RewardError(
                self.name, f"the answer is {choice!r}; expected first, second, tie or None", completion=completion
            )
        chosen, rejected = (second, first) if choice == "second" else (first, second)
        self.store.add_comparison(prompt, chosen, rejected, tie=choice == "tie")

    def _check(self, score: Any, completion: str) -> None:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise RewardError(
                self.name, f"the answer is {score!r}; expected a finite number or None", completion=completion
            )


def _nan_for_none(value: float | None) -> float:
    return math.nan if value is None else value


def _printable(text: str) -> str:
    """The text with everything that a terminal would obey escaped; spaces and line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
