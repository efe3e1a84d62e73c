"""The yardsticks for the language model: two trigram models over words that learn from the same text.

:class:`InterpolatedTrigram` is the plain one: relative frequencies of one, two and three words, interpolated linearly
with weights that fit the validation snippets best (Jelinek and Mercer 1980). :class:`MixedTrigram` is about as good as
a trigram gets: interpolated modified Kneser-Ney (Chen and Goodman 1999, equations 26 to 29), one from the real
snippets, one from the sampled ones, one from both and one from the general text, mixed linearly with tuned weights.

Words outside the training text are spelled by a character model, so that each is, like the language model, a
probability distribution over texts and no word is left out of the comparison.
"""

import math
from collections import Counter
from collections.abc import Iterable

START, END, UNKNOWN = "<s>", "</s>", "<unk>"


class KneserNey:
    """Interpolated modified Kneser-Ney of a given order over sequences of symbols.

    :param order: 3 for a trigram
    :param sequences: the training sequences, without start and end symbols
    """

    def __init__(self, order: int, sequences: Iterable[list[str]]) -> None:
        self.order = order
        top: Counter[tuple[str, ...]] = Counter()
        symbols: set[str] = {END}
        for sequence in sequences:
            symbols.update(sequence)
            padded = [START] * (order - 1) + sequence + [END]
            for i in range(order - 1, len(padded)):
                top[tuple(padded[i - order + 1 : i + 1])] += 1
        self.vocabulary_size = len(symbols)
        counts: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(order + 1)]
        counts[order] = top
        for n in range(order - 1, 0, -1):  # continuation counts: in how many contexts was the shorter n-gram seen?
            for gram in counts[n + 1]:
                counts[n][gram[1:]] += 1
        self.counts = counts
        self.discounts = [self._discounts(counts[n]) if n else (0.0, 0.0, 0.0) for n in range(order + 1)]
        self.totals: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(order + 1)]
        self.discounted: list[Counter[tuple[str, ...]]] = [Counter() for _ in range(order + 1)]
        for n in range(1, order + 1):
            for gram, count in counts[n].items():
                self.totals[n][gram[:-1]] += count
                self.discounted[n][gram[:-1]] += self.discounts[n][min(count, 3) - 1]  # type: ignore[assignment]

    @staticmethod
    def _discounts(counts: Counter[tuple[str, ...]]) -> tuple[float, float, float]:
        n = Counter(min(count, 5) for count in counts.values())
        if not all(n[k] for k in (1, 2, 3, 4)):
            return 0.5, 0.75, 0.9
        y = n[1] / (n[1] + 2 * n[2])
        first, second, third = (k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))
        return max(0.05, first), max(0.05, second), max(0.05, third)

    def probability(self, symbol: str, context: tuple[str, ...]) -> float:
        """Return P(symbol | the last order - 1 symbols)."""
        p = 1.0 / (self.vocabulary_size + 1)
        for n in range(1, self.order + 1):
            before = context[len(context) - n + 1 :] if n > 1 else ()
            total = self.totals[n].get(before, 0)
            if not total:
                break
            count = self.counts[n].get((*before, symbol), 0)
            taken = self.discounts[n][min(count, 3) - 1] if count else 0.0
            p = (count - taken) / total + self.discounted[n][before] / total * p
        return p


class WordMixture:
    """Probabilities of words from several models, mixed linearly with weights that fit the validation text best.

    :param names: of the models
    :param known: all words of the training text
    :param validation: what the weights are tuned on
    """

    def __init__(self, names: list[str], known: set[str], validation: list[list[str]]) -> None:
        self.names = names
        self.known = known
        self.spelling = KneserNey(5, [list(word) for word in sorted(known)])
        unknown = sum(word not in known for sequence in validation for word in sequence)
        total = sum(len(sequence) + 1 for sequence in validation)
        self.unknown_rate = (unknown + 1) / (total + 1)
        rows = [
            self.parts(word, context)
            for sequence in validation
            for word, context in self._events(sequence)
            if word != UNKNOWN
        ]
        self.weights = [1 / len(names)] * len(names)
        for _ in range(40):  # expectation-maximisation of the mixture weights
            shares = [0.0] * len(names)
            for row in rows:
                parts = [w * p for w, p in zip(self.weights, row, strict=True)]
                whole = sum(parts)
                for i, part in enumerate(parts):
                    shares[i] += part / whole
            self.weights = [share / len(rows) for share in shares]

    def parts(self, word: str, context: tuple[str, str]) -> list[float]:
        """What each of the models says of a known word."""
        raise NotImplementedError

    def _events(self, sequence: list[str]) -> list[tuple[str, tuple[str, str]]]:
        symbols = [START, START, *(word if word in self.known else UNKNOWN for word in sequence), END]
        return [(symbols[i], (symbols[i - 2], symbols[i - 1])) for i in range(2, len(symbols))]

    def nats(self, sequence: list[str]) -> float:
        """Return -log P of the words and the end of one text."""
        total = 0.0
        for i, (symbol, context) in enumerate(self._events(sequence)):
            if symbol == UNKNOWN:
                total -= math.log(self.unknown_rate)
                letters = list(sequence[i])
                history = [START] * 4
                for letter in [*letters, END]:
                    total -= math.log(self.spelling.probability(letter, tuple(history[-4:])))
                    history.append(letter)
            else:
                p = sum(w * part for w, part in zip(self.weights, self.parts(symbol, context), strict=True))
                total -= math.log((1 - self.unknown_rate) * p)
        return total


class MixedTrigram(WordMixture):
    """Kneser-Ney trigrams of several texts."""

    def __init__(self, texts: dict[str, list[list[str]]], validation: list[list[str]]) -> None:
        self.models = [KneserNey(3, text) for text in texts.values()]
        known = {word for text in texts.values() for sequence in text for word in sequence}
        super().__init__(list(texts), known, validation)

    def parts(self, word: str, context: tuple[str, str]) -> list[float]:
        return [model.probability(word, context) for model in self.models]


class InterpolatedTrigram(WordMixture):
    """Relative frequencies of a word alone, after one word and after two, and equal shares for all words."""

    def __init__(self, text: list[list[str]], validation: list[list[str]]) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.totals: Counter[tuple[str, ...]] = Counter()
        for sequence in text:
            padded = [START, START, *sequence, END]
            for i in range(2, len(padded)):
                for n in range(3):
                    self.counts[tuple(padded[i - n : i + 1])] += 1
                    self.totals[tuple(padded[i - n : i])] += 1
        known = {word for sequence in text for word in sequence}
        self.vocabulary_size = len(known) + 1  # with the end
        super().__init__(["trigram", "bigram", "unigram", "equal"], known, validation)

    def parts(self, word: str, context: tuple[str, str]) -> list[float]:
        found = [
            self.counts[(*before, word)] / total if (total := self.totals[before]) else 0.0
            for before in (context, context[1:], ())
        ]
        return [*found, 1 / self.vocabulary_size]
