"""An exploration bonus: what the policy has not written lately is worth more."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any, Literal, get_args

from textgym.checks import check_choice, check_int
from textgym.rewards.learning import LearningReward
from textgym.text_units import ngrams_of, units_of

NoveltyUnit = Literal["words", "characters"]


class NoveltyReward(LearningReward):
    """A count-based bonus for n-grams that few remembered completions have.

    Φ(y) = Σ_g 1/√(1 + N(g)) / max(n, floor), over the different n-grams g of the completion, of which it has n in all;
    N(g) is how many of the remembered completions have g. The 1/√N bonus is that of Strehl and Littman (2008), for
    pseudo-counts Bellemare et al. 2016, https://arxiv.org/abs/1606.01868. Repeating an n-gram within a text adds to n
    only, and the floor keeps one novel word from being a perfect text.

    The memory takes in the policy's complete texts between rollouts
    (:class:`~textgym.rewards.learning.LearningReward`), forgets the oldest, and is saved in checkpoints. The prompt
    doesn't count.

    Range: [0, 1]; 0 for the empty completion and others that have no n-gram.

        >>> novelty = NoveltyReward(n=1, floor=1)
        >>> novelty(prompts=[""], completions=["a warm film"])
        [1.0]
        >>> novelty.observe(prompts=[""] * 3, completions=["a warm film"] * 3)
        >>> novelty(prompts=[""] * 3, completions=["a warm film", "warm warm", "stormy seas"])
        [0.5, 0.25, 1.0]

    :param n: length of the n-grams
    :param memory: completions remembered
    :param floor: n-grams that a text is taken to have at least
    :param unit: what n-grams consist of: ``"words"`` (between white space; characters in scripts without spaces), or
        ``"characters"``
    :raises ValueError: if a number is not at least 1, or the unit unknown
    """

    def __init__(self, n: int = 2, memory: int = 4096, floor: int = 8, unit: NoveltyUnit = "words") -> None:
        self.n = check_int("n", n, low=1)
        self.memory = check_int("memory", memory, low=1)
        self.floor = check_int("floor", floor, low=1)
        self.unit = check_choice("unit", unit, get_args(NoveltyUnit))
        self._texts: deque[str] = deque()
        self._counts: Counter[tuple[str, ...]] = Counter()  # n-gram to number of remembered texts that have it

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [self._novelty(text) for text in completions]

    def observe(self, *, prompts: list[str], completions: list[str], **columns: Any) -> None:
        """Remember completions, and forget the oldest beyond ``memory``."""
        for text in completions:
            self._texts.append(text)
            self._counts.update(set(self._ngrams(text)))
            if len(self._texts) > self.memory:
                forgotten = set(self._ngrams(self._texts.popleft()))
                self._counts.subtract(forgotten)
                for ngram in forgotten:
                    if self._counts[ngram] == 0:
                        del self._counts[ngram]

    def metrics(self) -> dict[str, float]:
        """How many completions are remembered."""
        return {"novelty/remembered": float(len(self._texts))}

    def state_dict(self) -> dict[str, Any]:
        return {"texts": list(self._texts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"texts"}:
            raise ValueError(f"reward {self.name!r} remembers texts, but was given {sorted(state)}: another reward's")
        self._texts.clear()
        self._counts.clear()
        self.observe(prompts=[], completions=state["texts"])

    def _ngrams(self, text: str) -> list[tuple[str, ...]]:
        return ngrams_of(units_of(text) if self.unit == "words" else text, self.n)

    def _novelty(self, text: str) -> float:
        ngrams = self._ngrams(text)
        bonus = sum((1 + self._counts[ngram]) ** -0.5 for ngram in sorted(set(ngrams)))  # sorted: the same last bits
        return bonus / max(len(ngrams), self.floor)
