"""Process reward models: a token classifier that scores the steps of a text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from textgym.checks import check_choice, check_text
from textgym.handed_on import hands_on
from textgym.rewards.base import Reward
from textgym.rewards.models.classifier import Output, check_score, label_index, label_values
from textgym.rewards.models.text_forward import ReadingArguments, TextForward, open_pretrained


@hands_on(TextForward)
class ProcessReward(Reward):
    """Scores of a text's steps by a token classifier (a process reward model), put together to one number.

    Each step of the completion is scored where it ends, at the last token that has a character of it; Φ is the mean,
    the last, the smallest or the product of these scores ("Let's Verify Step by Step", Lightman et al. 2023, takes the
    product or the minimum of probabilities). Probabilities lie between 0 and 1, and so does Φ; logits have no limits.
    0.0 for a completion without a step. The last step counts though it may be unfinished. Of texts longer than
    ``max_length`` the beginning is cut off, with the steps in it. Further arguments are those of
    :class:`~textgym.rewards.models.text_forward.TextForward`.

    :param model: for example from ``AutoModelForTokenClassification``; put in evaluation mode
    :param tokenizer: the model's tokenizer, a fast one: it has to say which characters a token stands for
    :param label: name or index of the label that means a good step; may be left out where there is one only
    :param output: ``"logit"`` or ``"probability"``: σ(z) of a model with one output, else softmax(z)_k
    :param reduce: ``"mean"``, ``"last"``, ``"min"`` or ``"product"``
    :param separator: what comes between steps; it belongs to the step before it
    :raises ValueError: if there is no such label, with those there are, the tokenizer is a slow one, or another
        parameter is out of range

    >>> from transformers import AutoTokenizer, LlamaConfig, LlamaForTokenClassification
    >>> from textgym.embedded import LANGUAGE_MODEL
    >>> config = LlamaConfig(vocab_size=4096, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    >>> model, tokenizer = LlamaForTokenClassification(config), AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    >>> least, mean = (ProcessReward(model, tokenizer, label=1, reduce=by, separator=";") for by in ("min", "mean"))
    >>> texts = {"prompts": ["it is"] * 2, "completions": [" good; and it is bad.", " good;"]}
    >>> (both, first), (both_mean, _) = least(**texts), mean(**texts)
    >>> abs(both - min(first, 2 * both_mean - first)) < 1e-6
    True
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str | int | None = None,
        output: Output = "probability",
        reduce: Literal["mean", "last", "min", "product"] = "mean",
        separator: str = "\n",
        **arguments: Unpack[ReadingArguments],
    ) -> None:
        check_choice("output", output, ("logit", "probability"))
        check_choice("reduce", reduce, tuple(_REDUCTIONS))
        check_text("separator", separator, empty=False)  # it is what stands between steps
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} can't say which characters a token stands for; use a fast one"
            )
        self.label = label_index(model, label)
        self.reader = TextForward(model, tokenizer, truncation_side="left", **arguments)
        self.output = output
        self.reduce = reduce
        self.separator = separator
        self._name = Path(model.name_or_path).name or type(model).__name__

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        **options: Any,
    ) -> ProcessReward:
        """Open a token classifier; see :meth:`ClassifierReward.from_pretrained`."""
        kind = "a trained token classifier"
        model, tokenizer = open_pretrained(AutoModelForTokenClassification, path, tokenizer, dtype, kind)
        return cls(model, tokenizer, device=device, **options)

    @property
    def name(self) -> str:
        return self._name

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """:raises RewardError: if a score is not finite"""
        return [
            float(_REDUCTIONS[self.reduce](steps)) if len(steps) else 0.0
            for steps in self.step_scores(prompts, completions)
        ]

    def step_scores(self, prompts: list[str], completions: list[str]) -> list[np.ndarray]:
        """Scores of the steps of each completion, float64, in their order.

        :raises RewardError: if a score is not finite
        """
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        encoded = self.reader.encode(texts, return_offsets_mapping=True)
        positions = [
            self._step_ends(row["offset_mapping"], len(prompt), completion)
            for row, prompt, completion in zip(encoded, prompts, completions, strict=True)
        ]
        scores = [np.zeros(0)] * len(texts)
        for part, _, outputs in self.reader.run(encoded):
            for place, i in enumerate(part.tolist()):
                if positions[i]:
                    logits = outputs.logits[place, positions[i]]  # (steps, labels)
                    scores[i] = label_values(self.reader.model, logits, self.label, self.output)
                    for value in scores[i]:
                        check_score(self.name, float(value), i, completions[i])
        return scores

    def _step_ends(self, offsets: list[tuple[int, int]], start: int, completion: str) -> list[int]:
        """At which token each step of the completion ends; those that are cut off have none.

        :param offsets: for each token the characters of the text it stands for; (0, 0) of special tokens
        :param start: characters of the prompt
        """
        found = []
        pieces = completion.split(self.separator)
        for number, piece in enumerate(pieces, 1):
            end = start + len(piece) + (len(self.separator) if number < len(pieces) else 0)
            inside = [i for i, (first, behind) in enumerate(offsets) if first < end and behind > start]
            if piece.strip() and inside:  # an empty line is not a step
                found.append(inside[-1])
            start = end
        return found


_REDUCTIONS: dict[str, Any] = {
    "mean": np.mean,
    "last": lambda steps: steps[-1],
    "min": np.min,
    "product": np.prod,
}
