"""A small transformer as the discriminator of :class:`~textgym.rewards.learned.adversarial.AdversarialReward`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textgym.chat.turns import TurnTokens
from textgym.checks import check_int, check_number
from textgym.encodable_text import well_formed
from textgym.engine.trunk import trunk_of
from textgym.rewards.base import Reward
from textgym.rewards.errors import RewardError
from textgym.rewards.models.causal import CausalRewardModel
from textgym.vocabulary import is_encoder_decoder, position_limit


class CausalDiscriminator:
    """A causal sequence classifier, trained to tell at every token who has written the text so far.

    The loss is the binary cross-entropy at each token, averaged over the tokens of a text and then over texts, so its
    logit means something on every prefix; all prefixes of a text are scored in one pass, and with a KV cache where the
    policy has the same tokenizer. Weights and optimizer are saved in checkpoints. Texts are cut to the model's context
    where it learns, and an error where it scores.

        >>> from textgym.embedded import REWARD_MODEL
        >>> from transformers import AutoModelForSequenceClassification, AutoTokenizer
        >>> model = AutoModelForSequenceClassification.from_pretrained(REWARD_MODEL)
        >>> discriminator = CausalDiscriminator(model, AutoTokenizer.from_pretrained(REWARD_MODEL), learning_rate=1e-3)
        >>> texts = ["the film is a quiet marvel.", "the film is so so so so."]
        >>> losses = [discriminator.fit(texts, np.array([1.0, 0.0])) for _ in range(10)]
        >>> losses[9] < losses[0]
        True

    :param model: a classifier with one label and a head called ``score``, such as
        ``LlamaForSequenceClassification(config)`` with ``num_labels=1``; it is trained in place, and
        made float32 if it is not: half precision has no room for the small steps of an optimizer
    :param tokenizer: the model's tokenizer
    :param learning_rate: of AdamW
    :param batch_size: texts per optimizer step
    :param max_grad_norm: gradients are scaled down to this norm
    :raises ValueError: as :class:`~textgym.rewards.models.causal.CausalRewardModel`
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        learning_rate: float = 1e-4,
        batch_size: int = 32,
        max_grad_norm: float = 1.0,
    ) -> None:
        check_number("learning_rate", learning_rate, low=0.0, open_low=True)
        check_int("batch_size", batch_size, low=1)
        check_number("max_grad_norm", max_grad_norm, low=0.0, open_low=True)
        if is_encoder_decoder(model.config):
            raise ValueError(
                f"{type(model).__name__} is an encoder-decoder; a discriminator reads a text from its first token on: "
                "give a causal sequence classifier such as LlamaForSequenceClassification"
            )
        self._causal = CausalRewardModel(model, tokenizer, activation="identity", dtype="float32", append_eos=False)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)

    @property
    def reward(self) -> Reward:
        """Scores prefixes with the logit."""
        return self._causal

    def logits(self, texts: list[str]) -> np.ndarray:
        if not texts:
            return np.zeros(0)
        # Where a tokenizer adds nothing, the empty text has no token to read, and nothing can be said of it.
        readable = [i for i, ids in enumerate(self._ids(texts)) if ids]
        logits = np.zeros(len(texts))
        if readable:
            chosen = [well_formed(texts[i]) for i in readable]
            logits[readable] = self._causal(prompts=[""] * len(chosen), completions=chosen)
        return logits

    def fit(self, texts: list[str], labels: np.ndarray) -> float:
        pairs = [(ids, label) for ids, label in zip(self._ids(texts), labels.tolist(), strict=True) if ids]
        losses: list[float] = []
        self.model.train()
        try:
            for start in range(0, len(pairs), self.batch_size):
                part = pairs[start : start + self.batch_size]
                loss = self._loss([ids for ids, _ in part], [label for _, label in part])
                if not torch.isfinite(loss).all():
                    raise RewardError(
                        "causal discriminator",
                        f"its loss is {loss.mean().item()}, so it was left as it is; a smaller learning_rate than "
                        f"{self.optimizer.param_groups[0]['lr']:g} may have kept its weights finite",
                    )
                self.optimizer.zero_grad()
                loss.mean().backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
                self.optimizer.step()
                losses += loss.tolist()
        finally:
            self.model.eval()
        return float(np.mean(losses)) if losses else 0.0

    def state_dict(self) -> dict[str, Any]:
        weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        return {"weights": weights, "optimizer": copy.deepcopy(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state.get("weights", ())) != set(self.model.state_dict()):
            raise ValueError(f"the given state has other weights than the discriminator {type(self.model).__name__}")
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would take the tensors themselves

    def _loss(self, rows: list[list[int]], labels: list[float]) -> Tensor:
        """``(B,)`` mean cross-entropy over the tokens of each text, nats."""
        width, device = max(map(len, rows)), self.model.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # (B, L)
        real = torch.arange(width, device=device) < lengths[:, None]  # (B, L)
        hidden = trunk_of(self.model)(input_ids=ids, attention_mask=real.long(), use_cache=False)[0]  # (B, L, H)
        logits = self.model.score(hidden)[..., 0].float()  # (B, L)
        targets = torch.tensor(labels, device=device)[:, None].expand_as(logits)
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return (losses * real).sum(dim=1) / lengths

    def _ids(self, texts: list[str]) -> list[list[int]]:
        limit = position_limit(self.model.config)
        rows = TurnTokens(self.tokenizer).encode_all([well_formed(text) for text in texts], whole=True)
        return [row[:limit] for row in rows]
