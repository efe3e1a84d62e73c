"""A reward that learns to tell the policy's texts from people's."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

from textgym.checks import check_choice, check_int, check_number, check_texts, listed
from textgym.rewards.base import Reward, potentials_of, prefix_potentials_of
from textgym.rewards.learning import LearningReward
from textgym.rewards.prefixes import PrefixBatch
from textgym.text_units import pieces_of, units_of

Output = Literal["probability", "log", "logit"]


class Discriminator(Protocol):
    """What tells people's texts (1) from the policy's (0)."""

    @property
    def reward(self) -> Reward | None:
        """A reward whose Φ are the logits, where that scores prefixes faster than text by text; else None."""

    def logits(self, texts: list[str]) -> np.ndarray:
        """``(N,)`` log-odds that each was written by a person; of prefixes, too."""

    def fit(self, texts: list[str], labels: np.ndarray) -> float:
        """Learn from texts and labels ``(N,)``, 1 for people's; the mean loss before it, in nats."""

    def state_dict(self) -> dict[str, Any]:
        """What it learned."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""


class AdversarialReward(LearningReward):
    """D(x, y): how sure a discriminator is that a person wrote the text, trained against the policy (GAN-style).

    The discriminator minimises −log D(human) − log(1 − D(policy)) on the policy's complete texts and as many human
    ones, drawn anew each time, between two rollouts (:class:`~textgym.rewards.learning.LearningReward`). ``output``
    says what is paid:

    =============== =================== ========== ==================================================
    ``output``      Φ                   range      as in
    =============== =================== ========== ==================================================
    ``probability`` D                   (0, 1)     SeqGAN, Yu et al. 2017, https://arxiv.org/abs/1609.05473
    ``log``         log D               (−∞, 0)    the generator's loss of Goodfellow et al. 2014
    ``logit``       log D − log(1 − D)  unbounded  AIRL, Fu et al. 2018, https://arxiv.org/abs/1710.11248
    =============== =================== ========== ==================================================

    Both texts of a pair are cut to the same number of words, or the discriminator would learn how long people write.
    Texts are prompt and completion together, so human texts should begin as the prompts do. :meth:`metrics` has
    ``adversarial/accuracy``: the share of the new policy texts and of as many human ones that were told apart *before*
    learning from them; 0.5 is a policy that can't be told from people. The same human texts come again, so it flatters
    a discriminator that learns few of them by heart.

        >>> reward = AdversarialReward(["a warm film", "a fine story", "a quiet film"])
        >>> reward(prompts=["a"], completions=[" warm story"])
        [0.5]
        >>> for _ in range(20):
        ...     reward.observe(prompts=["a"] * 4, completions=[" so so so"] * 4)
        >>> human, policy = reward(prompts=["a", "a"], completions=[" warm story", " so so so"])
        >>> human > 0.8, policy < 0.2, reward.metrics()["adversarial/accuracy"]
        (True, True, 1.0)

    :param human_texts: what people wrote, whole texts
    :param discriminator: default :class:`HashingDiscriminator`; for a small transformer
        :class:`~textgym.rewards.learned.causal_discriminator.CausalDiscriminator`
    :param output: see the table
    :param epochs: passes over each batch of texts
    :param seed: of the choice of human texts
    :raises ValueError: if no human text has a word, or an argument is impossible
    """

    def __init__(
        self,
        human_texts: Iterable[str],
        discriminator: Discriminator | None = None,
        output: Output = "probability",
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        self.human_texts = [text for text in check_texts("human_texts", listed(human_texts)) if text.split()]
        if not self.human_texts:
            raise ValueError("human_texts has no text with a word in it; give texts that people wrote")
        check_choice("output", output, get_args(Output))
        check_int("epochs", epochs, low=1)
        check_int("seed", seed, low=0)
        self.discriminator: Discriminator = HashingDiscriminator() if discriminator is None else discriminator
        self.output = output
        self.epochs = epochs
        self._rng = np.random.default_rng(seed)
        self._metrics: dict[str, float] = {}

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return list(self._paid(self.discriminator.logits(texts)).tolist())

    def observe(self, *, prompts: list[str], completions: list[str], **columns: Any) -> None:
        """Measure the accuracy on the policy's complete texts, then learn to tell them from human ones."""
        policy = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        policy = [text for text in policy if text.split()]
        if not policy:
            return
        enough = len(self.human_texts) >= len(policy)
        drawn = self._rng.choice(len(self.human_texts), size=len(policy), replace=not enough)
        pairs = [_of_one_length(self.human_texts[i], text) for i, text in zip(drawn.tolist(), policy, strict=True)]
        texts = [text for pair in pairs for text in pair]
        labels = np.tile([1.0, 0.0], len(pairs))
        sure = self.discriminator.logits(texts)
        # Who says nothing, a logit of 0, is half right.
        accuracy = float(np.mean(np.where(sure == 0, 0.5, (sure > 0) == (labels == 1))))
        losses = [self.discriminator.fit(texts, labels) for _ in range(self.epochs)]
        self._metrics = {"adversarial/accuracy": accuracy, "adversarial/loss": losses[0]}

    def metrics(self) -> dict[str, float]:
        """Accuracy and loss (nats) on the newest texts, before learning from them."""
        return dict(self._metrics)

    def forget(self, rows: np.ndarray) -> None:
        if self.discriminator.reward is not None:
            self.discriminator.reward.forget(rows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "discriminator": self.discriminator.state_dict(),
            "random": self._rng.bit_generator.state,
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "discriminator" not in state:
            raise ValueError(f"reward {self.name!r} has a discriminator, the given state {sorted(state)} has none")
        self.discriminator.load_state_dict(state["discriminator"])
        self._rng.bit_generator.state = state["random"]
        self._metrics = dict(state["metrics"])

    def _evaluate(self, batch: PrefixBatch) -> np.ndarray:
        if self.discriminator.reward is None:
            return super()._evaluate(batch)
        return self._paid(potentials_of(self.discriminator.reward, batch))

    def _evaluate_prefixes(self, batch: PrefixBatch, at: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.discriminator.reward is None:
            return super()._evaluate_prefixes(batch, at)
        return [self._paid(row) for row in prefix_potentials_of(self.discriminator.reward, batch, at)]

    def _paid(self, logits: np.ndarray) -> np.ndarray:
        if self.output == "logit":
            return logits
        log = -np.logaddexp(0.0, -logits)  # log σ
        return log if self.output == "log" else np.exp(log)


class HashingDiscriminator:
    """Logistic regression on hashed word n-grams (Weinberger et al. 2009): fast, and without a model.

    Features are counts of words and of pairs of neighbours, lower-cased, hashed with CRC-32 into ``size`` columns and
    scaled to length 1; weights are learned text by text with AdaGrad (Duchi et al. 2011). Each text is also learned
    from cut at a random word, so that it means something on prefixes.

        >>> discriminator = HashingDiscriminator()
        >>> losses = [discriminator.fit(["a warm film", "so so so"], np.array([1.0, 0.0])) for _ in range(5)]
        >>> round(losses[0], 3), losses[4] < 0.2  # log 2 before anything is learned
        (0.693, True)
        >>> human, policy = discriminator.logits(["a warm story", "so"]).tolist()
        >>> human > 0 > policy
        True

    :param size: number of columns
    :param learning_rate: of AdaGrad
    :param l2: weight decay of the features a text has
    :param seed: of the cuts
    """

    reward: Reward | None = None

    def __init__(self, size: int = 1 << 15, learning_rate: float = 0.5, l2: float = 1e-4, seed: int = 0) -> None:
        check_int("size", size, low=2)
        check_number("learning_rate", learning_rate, low=0.0, open_low=True)
        check_number("l2", l2, low=0.0)
        self.size = size
        self.learning_rate = learning_rate
        self.l2 = l2
        self.weights = np.zeros(size + 1)  # the last is the bias
        self._squares = np.zeros(size + 1)  # of the gradients so far
        check_int("seed", seed, low=0)
        self._rng = np.random.default_rng(seed)

    def logits(self, texts: list[str]) -> np.ndarray:
        features = [self._features(text) for text in texts]
        return np.array([self.weights[columns] @ values for columns, values in features], dtype=np.float64)

    def fit(self, texts: list[str], labels: np.ndarray) -> float:
        loss = float(np.mean(np.logaddexp(0.0, np.where(labels == 1, -1.0, 1.0) * self.logits(texts))))
        for i in self._rng.permutation(len(texts)).tolist():
            self._step(texts[i], labels[i])
            words = pieces_of(texts[i])
            self._step("".join(words[: int(self._rng.integers(1, len(words) + 1))]), labels[i])
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights.copy(),
            "squares": self._squares.copy(),
            "random": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        shape = np.shape(state.get("weights", ()))
        if shape != self.weights.shape:
            raise ValueError(f"the discriminator has size={self.size}, the given state has weights of shape {shape}")
        self.weights[:] = state["weights"]
        self._squares[:] = state["squares"]
        self._rng.bit_generator.state = state["random"]

    def _step(self, text: str, label: float) -> None:
        columns, values = self._features(text)
        probability = 1 / (1 + np.exp(-np.clip(self.weights[columns] @ values, -30, 30)))
        gradient = (probability - label) * values + self.l2 * self.weights[columns]
        self._squares[columns] += gradient**2
        self.weights[columns] -= self.learning_rate * gradient / np.sqrt(self._squares[columns] + 1e-12)

    def _features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Columns and values of the features that a text has, bias included."""
        words = units_of(text.lower())
        grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
        hashes = [zlib.crc32(gram.encode("utf-8", "surrogatepass")) % self.size for gram in grams]
        columns, counts = np.unique(np.array(hashes, dtype=np.int64), return_counts=True)
        values = counts / max(float(np.linalg.norm(counts)), 1.0)
        return np.append(columns, self.size), np.append(values, 1.0)


def _of_one_length(human: str, policy: str) -> tuple[str, str]:
    """Both texts cut to the number of words of the shorter one."""
    words = [pieces_of(text) for text in (human, policy)]
    shorter = min(map(len, words))
    first, second = ("".join(some[:shorter]).rstrip() for some in words)
    return first, second
