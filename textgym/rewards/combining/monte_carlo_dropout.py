"""How unsure one reward model is: its scores under several dropout masks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textgym.checks import check_int, check_number
from textgym.rewards.arithmetic import Composed
from textgym.rewards.base import potentials_of, prefix_potentials_of
from textgym.rewards.combining.ensemble import Aggregate, aggregated, check_aggregate, spread_of
from textgym.rewards.function_reward import RewardLike, check_reward
from textgym.rewards.prefixes import PrefixBatch
from textgym.rewards.scores import as_list, scores_of

HEADS = ("score", "classifier")  # what sequence classifiers call their last layer


class MonteCarloDropout(Composed):
    """mean − k · std of a reward model's scores under several dropout masks (Gal and Ghahramani 2016).

    Each of the ``passes`` is a thinned network of its own: its masks drop whole features, the same at every position
    and for every text, as in Gal and Ghahramani's dropout for sequences (https://arxiv.org/abs/1512.05287), and are
    drawn from ``seed`` alone. So Φ is a function of the text: it does not depend on the batch, on the order of calls,
    or on whether a text is scored prefix by prefix.

    Masks replace the model's ``nn.Dropout`` layers, with their own rates; dropout of attention weights is none of them
    and stays off. ``head_dropout`` drops features of what the last layer reads, too: the way for models without
    dropout, such as Llama's.

    A pass costs a forward over the whole prefix, since what one network has cached is wrong for the next: leave scoring
    deferred, or use ``reward_every="end"``.

    Range: that of the reward for ``mean`` and ``min``; the penalties reach below it.

        >>> from textgym.rewards import CausalRewardModel
        >>> from textgym.embedded import REWARD_MODEL
        >>> model = CausalRewardModel.from_pretrained(REWARD_MODEL, device="cpu")
        >>> unsure = MonteCarloDropout(model, passes=16, head_dropout=0.2, aggregate="mean-std")
        >>> texts = {"prompts": ["the film is"], "completions": [" a warm and funny story."]}
        >>> unsure(**texts)[0] < model(**texts)[0]
        True

    :param reward: a reward with a ``model``, such as a causal reward model or a classifier
    :param passes: number of networks
    :param aggregate: what to make of their scores, see :class:`~textgym.rewards.combining.ensemble.Ensemble`
    :param k: weight of the penalty
    :param head_dropout: rate of dropout before the last layer; 0 for none
    :param seed: of the masks
    :raises TypeError: if the reward has no ``model`` that is a module
    :raises ValueError: if there is nothing to drop out, or a number is impossible
    """

    def __init__(
        self,
        reward: RewardLike,
        passes: int = 8,
        aggregate: Aggregate = "mean-std",
        k: float = 1.0,
        head_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        check_aggregate(aggregate, k)
        check_int("passes", passes, low=2, also="as one network has no spread")
        check_number("head_dropout", head_dropout, low=0.0, high=1.0, open_high=True)
        check_int("seed", seed, low=0)
        inner = check_reward("reward", reward)
        model = getattr(inner, "model", None)
        if not isinstance(model, nn.Module):
            raise TypeError(f"reward {inner.name!r} has no model to drop features of; give a reward model")
        super().__init__([inner], f"monte_carlo_dropout({inner.name})")
        self.passes = passes
        self.aggregate = aggregate
        self.k = float(k)
        self.seed = seed
        self._sites: list[tuple[str, nn.Module, float]] = [
            (name, module, module.p)
            for name, module in model.named_modules()
            if isinstance(module, nn.Dropout) and module.p > 0
        ]
        self._head: tuple[nn.Module, float] | None = None
        if head_dropout:
            heads = [getattr(model, name) for name in HEADS if isinstance(getattr(model, name, None), nn.Module)]
            if not heads:
                raise ValueError(f"{type(model).__name__} has no head called {' or '.join(HEADS)} for head_dropout")
            self._head = (heads[0], head_dropout)
        if not self._sites and self._head is None:
            raise ValueError(f"{type(model).__name__} has no dropout layers; give head_dropout=0.1, say")

    def spread(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """Standard deviation of the networks' scores of complete texts; None where the reward does not apply."""
        return spread_of(self._texts(prompts, completions, columns))

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        scores = self._texts(prompts, completions, columns)
        return as_list(self._checked(aggregated(scores, self.aggregate, self.k)))

    def _texts(self, prompts: list[str], completions: list[str], columns: dict[str, Any]) -> np.ndarray:
        """``(passes, B)`` scores of complete texts."""
        return np.stack([scores_of(self.parts[0], prompts, completions, columns) for _ in self._networks()])

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        scores = [potentials_of(self.parts[0], batch) for _ in self._networks(batch.rows)]
        return self._checked(aggregated(np.stack(scores), self.aggregate, self.k))

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        scores = [prefix_potentials_of(self.parts[0], batch, at) for _ in self._networks(batch.rows)]
        rows = zip(*scores, strict=True)
        return [self._checked(aggregated(np.stack(row), self.aggregate, self.k)) for row in rows]

    def _combine(self, *scores: np.ndarray) -> np.ndarray:
        return scores[0]

    def _networks(self, rows: np.ndarray | None = None) -> Iterator[int]:
        """Turn the model into one thinned network after the other.

        :param rows: environment rows of which another network may have something cached
        """
        for number in range(self.passes):
            with self._masked(number):
                if rows is not None:
                    self.parts[0].forget(rows)
                try:
                    yield number
                finally:
                    if rows is not None:
                        self.parts[0].forget(rows)

    @contextmanager
    def _masked(self, number: int) -> Iterator[None]:
        handles = [module.register_forward_hook(self._drop(number, name, p)) for name, module, p in self._sites]
        if self._head is not None:
            head, p = self._head
            drop = self._drop(number, "head", p)
            handles.append(
                head.register_forward_pre_hook(lambda module, args: (drop(module, args, args[0]), *args[1:]))
            )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _drop(self, number: int, name: str, p: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        """A forward hook that drops features of one layer's output ``(..., H)``."""

        def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            rng = np.random.default_rng([self.seed, number, zlib.crc32(name.encode())])
            kept = rng.random(output.shape[-1]) >= p  # (H,)
            return output * torch.as_tensor(kept / (1 - p), dtype=output.dtype, device=output.device)

        return drop
