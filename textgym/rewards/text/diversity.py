"""How a completion differs from the other completions of its prompt.

Such a reward depends on the batch by definition. What it compares a prefix with:

- The *peers* of a completion are the other completions of the same prompt text in the batch.
- The batch is what one call scores. With deferred scoring, the default of textgym's agents, that is the rollout: every
  episode of it, or the part that lies in it, is compared with every other, as far as each was written. With instant
  scoring it is the rows as they stand at that step: episodes that have ended are gone, and peers that began later are
  shorter. Called on texts it is the texts of the call.
- In an environment a prefix of t tokens is compared with the first t tokens of each peer, so that it is charged for the
  token that repeats and not for being short. Where rows run in step, both schedules pay the same; where they don't,
  deferred scoring compares with more. Called on texts, whole texts are compared.
- With ``reward_every="end"``, instant scoring compares only rows that end at the same step: leave scoring deferred.

A completion without peers resembles nothing: its value is 1. Give each prompt several rows (few prompts, many rows), or
nothing is compared.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from textgym.checks import check_int
from textgym.encodable_text import well_formed
from textgym.extras import import_extra
from textgym.rewards.base import Reward
from textgym.rewards.errors import RewardError
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import wanted_per_row
from textgym.text_units import spaced


class GroupReward(Reward):
    """A base for rewards that compare completions with their peers, see :mod:`textgym.rewards.text.diversity`."""

    @abstractmethod
    def compare(self, texts: list[str], peers: list[list[str]]) -> np.ndarray:
        """How each text differs from its peers.

        :param texts: K texts
        :param peers: for each at least one other text
        :return: ``(K,)`` float64
        """

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(i)
        peers = [[completions[j] for j in groups[prompt] if j != i] for i, prompt in enumerate(prompts)]
        return list(self._compared(completions, peers).tolist())

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        rows = batch.rows
        at = [np.array([length]) for length in batch.completion_lengths]
        # A row that occurs twice is one text at two moments, and no peer of itself.
        return np.concatenate([np.zeros(0), *self._against(batch, at, lambda i, j: bool(rows[i] != rows[j]))])

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._against(batch, at, lambda i, j: i != j)

    def _against(
        self, batch: PrefixBatch, at: Sequence[np.ndarray], are_peers: Callable[[int, int], bool]
    ) -> list[np.ndarray]:
        counts = wanted_per_row(batch, at)
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(batch.prompts):
            groups.setdefault(prompt, []).append(i)
        whole = batch.completion_lengths.tolist()
        peers_of = [[j for j in groups[prompt] if are_peers(i, j)] for i, prompt in enumerate(batch.prompts)]
        wanted = [(i, int(length)) for i, lengths in enumerate(at) for length in lengths]  # (K,)
        against = [[(j, min(length, whole[j])) for j in peers_of[i]] for i, length in wanted]
        cuts = list(dict.fromkeys([*wanted, *(cut for row in against for cut in row)]))
        texts = self._decoded(batch, cuts)
        values = self._compared([texts[cut] for cut in wanted], [[texts[cut] for cut in row] for row in against])
        return np.split(values, np.cumsum(counts)[:-1]) if counts else []

    def _decoded(self, batch: PrefixBatch, cuts: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
        """The completions of rows cut to lengths, given as pairs of both."""
        texts: list[str] = []
        for start in range(0, len(cuts), self.max_batch):
            part = cuts[start : start + self.max_batch]
            texts += batch.at([row for row, _ in part], [length for _, length in part]).completions
        return dict(zip(cuts, texts, strict=True))

    def _compared(self, texts: list[str], peers: list[list[str]]) -> np.ndarray:
        values = np.ones(len(texts))
        compared = [i for i, others in enumerate(peers) if others]
        if compared:
            values[compared] = self.compare([texts[i] for i in compared], [peers[i] for i in compared])
        return values


class SelfBLEU(GroupReward):
    """1 − BLEU of a completion with its peers as references, over 100 (Self-BLEU, Zhu et al. 2018).

    BLEU is sacrebleu's sentence BLEU with effective order and its default exponential smoothing; a completion that
    copies a peer has 0, one that shares no word with its peers 1. The empty completion has copied nothing: 1. What "the
    batch" is, and what a prefix is compared with: :mod:`textgym.rewards.text.diversity`. Zhu et al. 2018, "Texygen",
    https://arxiv.org/abs/1802.01886. Needs the extra ``metrics``.

    Range: [0, 1], more is more diverse.

        >>> texts = ["a warm film", "a warm film", "nothing happens here"]
        >>> [round(value, 3) for value in SelfBLEU()(prompts=["the"] * 3, completions=texts)]
        [0.0, 0.0, 1.0]
        >>> SelfBLEU()(prompts=["the", "a", "this"], completions=texts)  # other prompts' completions are not peers
        [1.0, 1.0, 1.0]

    :param max_order: longest n-gram, in words; in scripts without spaces each character is one
    :raises ModuleNotFoundError: if sacrebleu is not installed
    :raises ValueError: if ``max_order`` is not at least 1
    """

    def __init__(self, max_order: int = 4) -> None:
        check_int("max_order", max_order, low=1)
        metrics = import_extra("sacrebleu.metrics", "metrics", "SelfBLEU")
        self._bleu = metrics.BLEU(effective_order=True, max_ngram_order=max_order)

    def compare(self, texts: list[str], peers: list[list[str]]) -> np.ndarray:
        scores = [
            self._bleu.sentence_score(spaced(well_formed(text)), [spaced(well_formed(peer)) for peer in others]).score
            for text, others in zip(texts, peers, strict=True)
        ]
        return np.clip(1 - np.array(scores) / 100, 0, 1)  # a copy's BLEU is 100.00000000000004


class EmbeddingDiversity(GroupReward):
    """1 − mean cosine similarity of a completion's embedding to those of its peers.

    What "the batch" is, and what a prefix is compared with: :mod:`textgym.rewards.text.diversity`. An embedding of
    zeros, which a text without words may have, is similar to nothing. The mean distance of a set's members is its
    diversity as Tevet and Berant 2021 measure it (https://arxiv.org/abs/2004.02990).

    Range: [0, 2]; 0 where all mean the same, 1 where they are unrelated.

        >>> import numpy as np
        >>> def letters(texts):
        ...     return np.array([[text.count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])
        >>> diversity = EmbeddingDiversity(letters)
        >>> [round(value, 3) for value in diversity(prompts=["the"] * 3, completions=["aab", "baa", "xyz"])]
        [0.5, 0.5, 1.0]

    :param embed: turns N texts into an array ``(N, D)`` of finite numbers
    """

    def __init__(self, embed: Callable[[list[str]], Any]) -> None:
        if not callable(embed):
            raise TypeError(f"embed must be a function of a list of texts, got {type(embed).__name__} {embed!r}")
        self.embed = embed

    def compare(self, texts: list[str], peers: list[list[str]]) -> np.ndarray:
        different = list(dict.fromkeys([*texts, *(peer for others in peers for peer in others)]))
        parts = [
            self._unit_vectors(different[start : start + self.max_batch])
            for start in range(0, len(different), self.max_batch)
        ]
        vectors = dict(zip(different, np.concatenate(parts), strict=True))
        return np.array(
            [
                1 - float(np.mean([vectors[peer] @ vectors[text] for peer in others]))
                for text, others in zip(texts, peers, strict=True)
            ]
        )

    def _unit_vectors(self, texts: list[str]) -> np.ndarray:
        """``(N, D)`` embeddings of length 1, or 0 where they have none."""
        vectors = self.embed(texts)
        if hasattr(vectors, "detach"):
            vectors = vectors.detach().cpu().double()
        vectors = np.asarray(vectors, dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise RewardError(
                self.name, f"embed returned shape {vectors.shape} for {len(texts)} texts, expected (N, D)"
            )
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            raise RewardError(self.name, f"embed returned numbers that are not finite for {texts[wrong[0]][:60]!r}")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(lengths > 0, lengths, 1.0)
