"""Sentence embeddings, and the similarity of a completion to a reference as a reward."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Unpack

from textgym.checks import check_text
from textgym.engine.micro_batches import BATCH_TOKENS
from textgym.handed_on import hands_on
from textgym.rewards.base import Reward
from textgym.rewards.columns import texts_of
from textgym.rewards.models.text_forward import ForwardArguments, Side, TextForward, open_pretrained

Encoder: TypeAlias = Callable[[list[str]], np.ndarray]
"""What turns N texts into N vectors ``(N, D)``: a :class:`SentenceEncoder`, or any function that does."""


@hands_on(TextForward)
class SentenceEncoder:
    """Embeds texts: the mean of an encoder's last hidden states over a text's tokens, scaled to length 1.

    That is what sentence-transformers computes for all-MiniLM-L6-v2 and most of its models (Reimers and Gurevych,
    "Sentence-BERT", 2019). The order and the number of texts change nothing but the last digits. Further arguments are
    those of :class:`~textgym.rewards.models.text_forward.TextForward`.

    :param model: an encoder without a head, for example from ``AutoModel``
    :param tokenizer: its tokenizer
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **arguments: Unpack[ForwardArguments]
    ) -> None:
        self.reader = TextForward(model, tokenizer, **arguments)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] = "minilm",
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "float32",
        max_length: int | None = None,
        truncation_side: Side = "right",
        max_batch_tokens: int = BATCH_TOKENS,
    ) -> SentenceEncoder:
        """Open an encoder.

        :param path: ``"minilm"`` (from its PyPI package, see :mod:`textgym.packaged.minilm`), a directory or a hub id
        :param device: ``"auto"`` is the GPU where there is one, otherwise the CPU
        :param max_length: most tokens of a text; by default what the model can read, with ``"minilm"`` 256
        :param truncation_side: which end of a text that is too long is cut off
        :raises ModuleNotFoundError: if ``"minilm"`` is not installed, with the command that installs it
        """
        if path == "minilm":
            from textgym.packaged.minilm import MAX_TOKENS, minilm_directory

            path, max_length = minilm_directory(), max_length or MAX_TOKENS
        # The pooler is a head that the mean does not go through.
        model, tokenizer = open_pretrained(AutoModel, path, None, dtype, "an encoder", optional=("pooler.",))
        return cls(
            model,
            tokenizer,
            device=device,
            max_length=max_length,
            truncation_side=truncation_side,
            max_batch_tokens=max_batch_tokens,
        )

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embeddings of texts.

        :return: ``(N, H)`` float32 of length 1; zeros for a text without a token
        """
        different = list(dict.fromkeys(texts))
        vectors = np.zeros((len(different), self.reader.model.config.hidden_size), dtype=np.float32)
        for part, mask, outputs in self.reader.run(self.reader.encode(different)):
            weights = mask[:, :, None].float()  # (b, L, 1)
            mean = (outputs.last_hidden_state.float() * weights).sum(1) / weights.sum(1)  # (b, H)
            vectors[part] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        place = {text: i for i, text in enumerate(different)}
        return vectors[[place[text] for text in texts]] if texts else vectors


class EmbeddingSimilarity(Reward):
    """Cosine of the embeddings of the completion and of a reference in a column, from −1 to 1.

    Φ = max over references of cos(e(y), e(z)); 0.0 for a completion without any character but white space, None where
    the column has None.

    :param column: the column with the references, each a text or a list of texts
    :param encoder: what embeds; ``"minilm"``, a directory or a hub id, a :class:`SentenceEncoder`, or any function from
        N texts to ``(N, D)``

    >>> def letters(texts):
    ...     return np.array([[text.count("a"), text.count("b")] for text in texts])
    >>> reward = EmbeddingSimilarity("answer", encoder=letters)
    >>> reward(prompts=["p"] * 2, completions=["aaab", "b"], answer=["ab", ["aa", "bb"]])
    [0.894..., 1.0]
    """

    def __init__(self, column: str = "reference", encoder: Encoder | str | os.PathLike[str] = "minilm") -> None:
        self.column = check_text("column", column, empty=False)
        self.encoder = open_encoder(encoder)

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        """:raises RewardError: if the column is missing or an entry is not a text"""
        references = texts_of(self.name, self.column, columns, completions)
        flat = [text for some in references for text in some or ()]
        vectors = unit_vectors(self.encoder, completions + flat)
        scores: list[float | None] = []
        behind = len(completions)
        for i, some in enumerate(references):
            if some is None:
                scores.append(None)
                continue
            cosines = vectors[behind : behind + len(some)] @ vectors[i]
            behind += len(some)
            scores.append(float(cosines.max().clip(-1, 1)) if completions[i].strip() else 0.0)
        return scores


def open_encoder(encoder: Encoder | str | os.PathLike[str]) -> Encoder:
    """An encoder from what a reward was given."""
    return SentenceEncoder.from_pretrained(encoder) if isinstance(encoder, (str, os.PathLike)) else encoder


def unit_vectors(encoder: Encoder, texts: list[str]) -> np.ndarray:
    """Embeddings ``(N, D)`` in float64, of length 1; a vector of zeros stays one.

    :raises ValueError: if the encoder returns anything but one finite vector for each text
    """
    if not texts:
        return np.zeros((0, 1))
    vectors = np.asarray(encoder(texts), dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
        raise ValueError(
            f"encoder returned an array of shape {vectors.shape} for {len(texts)} texts; expected ({len(texts)}, D) "
            "finite numbers"
        )
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
