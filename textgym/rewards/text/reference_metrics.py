"""Metrics that compare a completion with references in a column of the prompt rows.

Each scores a completion by itself ("sentence level") and returns what the package it comes from returns. sacrebleu,
rouge-score and nltk come with ``pip install "textgym[metrics]"``. A column holds a text, a list of texts or None for
each row; where it holds None a metric does not apply.

A metric of a half-written text is low because words are still to come, so these are useful with ``reward_every=1``,
too: a token that completes a match is paid for it.
"""

from __future__ import annotations

import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from textgym.checks import check_bool, check_choice, check_text, shown
from textgym.extras import import_extra
from textgym.rewards.base import Reward
from textgym.rewards.columns import texts_of
from textgym.text_units import has_unspaced, is_chinese, spaced, units_of, words_of

EXTRA = "metrics"


class ReferenceMetric(Reward):
    """A function of a completion and its references.

    :param column: the column with the references, each a text or a list of texts
    """

    def __init__(self, column: str = "reference") -> None:
        self.column = check_text("column", column, empty=False)

    @abstractmethod
    def score(self, completion: str, references: tuple[str, ...]) -> float:
        """The metric of one completion."""

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """:raises RewardError: if the column is missing, with those there are, or an entry is not a text"""
        references = texts_of(self.name, self.column, columns, completions)
        return [
            None if some is None else float(self.score(completion, some))
            for completion, some in zip(completions, references, strict=True)
        ]


class Bleu(ReferenceMetric):
    """BLEU of one sentence, from 0 to 100, as ``sacrebleu.sentence_bleu`` returns it (Papineni et al. 2002, Post 2018).

    The geometric mean of the n-gram precisions up to 4, times the brevity penalty. N-grams without a match are smoothed
    ("exp" halves what is counted for each, method 3 of Chen and Cherry 2014), and only the orders that the completion
    is long enough for are used. 0.0 for an empty completion. Where the references are Chinese, sacrebleu's tokenizer
    ``"zh"`` is used unless ``tokenize`` names another one; in other scripts without spaces each character is a word.

    :param column: the column with the references, each a text or a list of texts
    :param options: of ``sacrebleu.BLEU``: ``smooth_method``, ``smooth_value``, ``max_ngram_order``, ``lowercase``,
        ``tokenize``

    >>> reward = Bleu("answer")
    >>> completions = ["the cat sat on the mat", "the cat is on the mat", ""]
    >>> reward(prompts=["p"] * 3, completions=completions, answer=["the cat sat on the mat"] * 3)
    [100.0..., 37.99..., 0.0]
    """

    def __init__(self, column: str = "reference", **options: Any) -> None:
        super().__init__(column)
        sacrebleu = import_extra("sacrebleu", EXTRA, "Bleu")
        self.metric = sacrebleu.BLEU(**{"effective_order": True, **options})
        chinese = {"effective_order": True, **options, "tokenize": "zh"}
        self._chinese = None if "tokenize" in options else sacrebleu.BLEU(**chinese)

    def score(self, completion: str, references: tuple[str, ...]) -> float:
        metric = self.metric
        if self._chinese is not None and any(map(has_unspaced, references)):
            if all(map(is_chinese, references)):
                metric = self._chinese
            else:
                completion, references = spaced(completion), tuple(map(spaced, references))
        return float(metric.sentence_score(completion, list(references)).score)


class ChrF(ReferenceMetric):
    """chrF of one sentence, from 0 to 100, as ``sacrebleu.sentence_chrf`` returns it (Popović 2015).

    The F score of character n-grams up to 6, in which recall weighs β² times as much as precision. ``word_order=2`` is
    chrF++.

    :param column: the column with the references, each a text or a list of texts
    :param options: of ``sacrebleu.CHRF``: ``char_order``, ``word_order``, ``beta``, ``lowercase``, ``whitespace``

    >>> ChrF("answer")(prompts=["p"] * 2, completions=["the cat sat", "cats"], answer=["the cat sat"] * 2)
    [100.0, 36.81...]
    """

    def __init__(self, column: str = "reference", **options: Any) -> None:
        super().__init__(column)
        self.metric = import_extra("sacrebleu", EXTRA, "ChrF").CHRF(**options)

    def score(self, completion: str, references: tuple[str, ...]) -> float:
        return float(self.metric.sentence_score(completion, list(references)).score)


class Ter(ReferenceMetric):
    """Minus the translation edit rate in percent: at most 0, without a lower limit; 0 is a reference, word by word.

    Minus what ``sacrebleu.sentence_ter`` returns, as fewer edits are better: insertions, deletions, substitutions and
    shifts of words for each 100 words of the reference (Snover et al. 2006). It is made for sentences: two texts
    of 1,700 random words took minutes. In scripts without spaces, such as Chinese, each character is a word, unless
    ``asian_support`` says what to do.

    :param column: the column with the references, each a text or a list of texts
    :param options: of ``sacrebleu.TER``: ``normalized``, ``no_punct``, ``asian_support``, ``case_sensitive``

    >>> Ter("answer")(prompts=["p"] * 2, completions=["the cat sat", "the cat"], answer=["the cat sat"] * 2)
    [-0.0, -33.33...]
    """

    def __init__(self, column: str = "reference", **options: Any) -> None:
        super().__init__(column)
        self.metric = import_extra("sacrebleu", EXTRA, "Ter").TER(**options)
        self._spaced = "asian_support" not in options

    def score(self, completion: str, references: tuple[str, ...]) -> float:
        if self._spaced and any(map(has_unspaced, references)):
            completion, references = spaced(completion), tuple(map(spaced, references))
        return -float(self.metric.sentence_score(completion, list(references)).score)


class Rouge(ReferenceMetric):
    """ROUGE from 0 to 1, as ``rouge_score`` returns it (Lin 2004); of several references the best.

    ``"rouge1"`` and ``"rouge2"`` count n-grams, ``"rougeL"`` is the longest common subsequence of words,
    ``"rougeLsum"`` the same sentence by sentence, one a line. ``rouge_score`` knows words of a to z and 0 to 9 only.
    Here a word in another script than Latin is one, too, and so is each character in scripts without spaces, such as
    Chinese.

    :param variant: ``"rouge1"`` to ``"rouge9"``, ``"rougeL"`` or ``"rougeLsum"``
    :param column: the column with the references, each a text or a list of texts
    :param measure: ``"fmeasure"``, ``"precision"`` or ``"recall"``
    :param stemmer: whether English words are compared by their Porter stems
    :param tokenizer: turns a text into its words, in place of all that

    >>> texts = {"prompts": ["p"], "completions": ["the cat is on the mat"], "answer": ["the cat sat on the mat"]}
    >>> for variant in ("rouge1", "rouge2", "rougeL"):
    ...     print(variant, *Rouge(variant, "answer")(**texts))
    rouge1 0.8333...
    rouge2 0.6...
    rougeL 0.8333...
    """

    def __init__(
        self,
        variant: str = "rougeL",
        column: str = "reference",
        *,
        measure: Literal["fmeasure", "precision", "recall"] = "fmeasure",
        stemmer: bool = False,
        tokenizer: Callable[[str], list[str]] | None = None,
    ) -> None:
        super().__init__(column)
        if not re.fullmatch(r"rouge([1-9]|L|Lsum)", check_text("variant", variant)):
            raise ValueError(f"variant={variant!r} must be 'rouge1' to 'rouge9', 'rougeL' or 'rougeLsum'")
        check_choice("measure", measure, ("fmeasure", "precision", "recall"))
        check_bool("stemmer", stemmer)
        if tokenizer is not None and not callable(tokenizer):
            raise TypeError(f"tokenizer={shown(tokenizer)} must be a function from a text to the list of its words")
        scorer = import_extra("rouge_score.rouge_scorer", EXTRA, "Rouge")
        latin = import_extra("rouge_score.tokenizers", EXTRA, "Rouge").DefaultTokenizer(stemmer)
        self.scorer = scorer.RougeScorer([variant], tokenizer=_Words(tokenizer or _all_scripts(latin.tokenize)))
        self.variant = variant
        self.measure = measure

    def score(self, completion: str, references: tuple[str, ...]) -> float:
        scores = (self.scorer.score(reference, completion)[self.variant] for reference in references)
        return max(float(getattr(score, self.measure)) for score in scores)


class Meteor(ReferenceMetric):
    """METEOR from 0 to 1, as ``nltk.translate.meteor_score`` computes it (Lavie and Agarwal 2007).

    Words are matched where they are the same, then by their Porter stems, then as synonyms. Synonyms need WordNet,
    which does not come with nltk but is downloaded by it: without ``wordnet`` there are none. The harmonic mean of
    precision and recall, with recall weighing 9 times as much, is lowered by up to half for matches that are not in a
    row. Words are what :func:`~textgym.text_units.words_of` finds, in lower case.

    :param column: the column with the references, each a text or a list of texts
    :param wordnet: ``nltk.corpus.wordnet``, where its data has been downloaded

    >>> Meteor("answer")(prompts=["p"] * 2, completions=["the cats sat", "dogs"], answer=["the cat sat"] * 2)
    [0.981..., 0.0]
    """

    def __init__(self, column: str = "reference", *, wordnet: Any = None) -> None:
        super().__init__(column)
        self._module = import_extra("nltk.translate.meteor_score", EXTRA, "Meteor")
        self.wordnet = _NoSynonyms() if wordnet is None else wordnet

    def score(self, completion: str, references: tuple[str, ...]) -> float:
        return float(
            self._module.meteor_score(
                [words_of(reference) for reference in references],
                words_of(completion),
                wordnet=self.wordnet,
            )
        )


class ExactMatch(ReferenceMetric):
    """1.0 where the completion is one of the references, else 0.0.

    Compared is what SQuAD's evaluation leaves of them (Rajpurkar et al. 2016): lower case, without punctuation, the
    articles a, an and the, and superfluous white space. Without ``normalize``, only white space at both ends is left
    out.

    :param column: the column with the references, each a text or a list of texts
    :param normalize: whether to compare as SQuAD does

    >>> reward = ExactMatch("answer")
    >>> reward(prompts=["p"] * 2, completions=[" The Mona Lisa!", " Lisa"], answer=["mona lisa"] * 2)
    [1.0, 0.0]
    """

    def __init__(self, column: str = "reference", *, normalize: bool = True) -> None:
        super().__init__(column)
        check_bool("normalize", normalize)
        self._compared: Callable[[str], str] = squad_answer if normalize else str.strip

    def score(self, completion: str, references: tuple[str, ...]) -> float:
        return float(any(self._compared(completion) == self._compared(reference) for reference in references))


class TokenF1(ReferenceMetric):
    """F1 of the words of completion and reference, from 0 to 1; of several references the best.

    SQuAD's definition (Rajpurkar et al. 2018, evaluate-v2.0): words of the texts normalised as in :class:`ExactMatch`,
    each counted as often as it occurs in both; 2PR / (P + R), 0.0 without a common word, and 1.0 where neither
    has a word.

    :param column: the column with the references, each a text or a list of texts

    >>> TokenF1("answer")(prompts=["p"], completions=["the Eiffel tower of Paris"], answer=["Eiffel Tower"])
    [0.666...]
    """

    def score(self, completion: str, references: tuple[str, ...]) -> float:
        return max(token_f1(completion, reference) for reference in references)


def token_f1(completion: str, reference: str) -> float:
    """F1 of the words of two texts, as SQuAD's evaluation computes it."""
    words, expected = units_of(squad_answer(completion)), units_of(squad_answer(reference))
    common = sum((Counter(words) & Counter(expected)).values())
    if common == 0:
        return float(words == expected)  # "no answer" is right where there is none
    precision, recall = common / len(words), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def squad_answer(text: str) -> str:
    """What SQuAD's evaluation compares of an answer.

    >>> squad_answer("The  Mona-Lisa, a painting!")
    'monalisa painting'
    """
    without_marks = "".join(mark for mark in text.lower() if mark not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without_marks).split())


class _Words:
    """What rouge_score calls a tokenizer."""

    def __init__(self, tokenize: Callable[[str], list[str]]) -> None:
        self.tokenize = tokenize


def _all_scripts(latin: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """A tokenizer that leaves Latin script to another one, and takes words of other scripts as they are."""

    def tokenize(text: str) -> list[str]:
        words: list[str] = []
        start = 0
        for match in _OTHER_SCRIPT.finditer(text):
            words += [*latin(text[start : match.start()]), *words_of(match[0].lower())]
            start = match.end()
        return words + latin(text[start:])

    return tokenize


class _NoSynonyms:
    """What METEOR asks WordNet, answered with nothing."""

    def synsets(self, word: str) -> list[Any]:
        return []


# That of scripts without spaces, too: 答案。 is the answer 答案.
_PUNCTUATION = frozenset(string.punctuation) | frozenset("，。、；：？！（）《》〈〉「」『』【】")
_OTHER_SCRIPT = re.compile(r"[^\W\d_\u0000-\u024f\u1e00-\u1eff](?:\w|[^\w\s\u0000-\u02ff])*")
