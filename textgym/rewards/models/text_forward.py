"""Texts through a transformer of any kind, in micro-batches: what classifiers, step scorers and encoders share."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import TypedDict

from textgym.chat.turns import TurnTokens
from textgym.encodable_text import well_formed
from textgym.engine.exactness import first_line
from textgym.engine.micro_batches import BATCH_TOKENS, check_batch_tokens, micro_batches
from textgym.engine.weight_files import readable_weights
from textgym.model_sources import quiet_progress, resolve_device, resolve_dtype
from textgym.rewards.models.adapters import base_of_adapter, open_adapted, tokenizer_of
from textgym.vocabulary import position_limit

Side = Literal["left", "right"]


class ReadingArguments(TypedDict, total=False):
    """What a :class:`TextForward` takes besides model, tokenizer and ``truncation_side``."""

    device: str | torch.device | None
    dtype: str | torch.dtype | None
    max_length: int | None
    max_batch_tokens: int


class ForwardArguments(ReadingArguments, total=False):
    """What a :class:`TextForward` takes besides model and tokenizer."""

    truncation_side: Side


class TextForward:
    """A model with its tokenizer, reading texts.

    Rows are filled up with what the model's configuration calls ``pad_token_id``, whatever the tokenizer has: causal
    classifiers look for the last token that is none. A model without one can't tell padding from text and reads one
    text at a time.

    :param model: put in evaluation mode, so that dropout never acts
    :param tokenizer: its tokenizer
    :param device: where to move the model; by default it stays where it is
    :param dtype: what to convert the weights to; by default they stay as they are
    :param max_length: most tokens of a text; longer ones are cut. By default what model and tokenizer can read
    :param truncation_side: which end of a text that is too long is cut off, ``"left"`` or ``"right"``
    :param max_batch_tokens: most tokens, padding included, that are forwarded at once: what bounds the memory
    :raises ValueError: if a parameter is out of range or ``max_length`` is more than the model can read
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        truncation_side: Side = "left",
        max_batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        if truncation_side not in ("left", "right"):
            raise ValueError(f"truncation_side must be 'left' or 'right', got {truncation_side!r}")
        check_batch_tokens(max_batch_tokens)
        model.to(
            device=None if device is None else resolve_device(device),
            dtype=None if dtype is None else resolve_dtype(dtype),
        )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_batch_tokens = max_batch_tokens
        self.pad_token_id: int | None = model.config.get_text_config().pad_token_id
        limit = readable_tokens(model, tokenizer)
        if max_length is not None and not 1 <= max_length <= (limit or max_length):
            raise ValueError(f"max_length must lie between 1 and {limit}, what the model can read; got {max_length}")
        self.max_length = limit if max_length is None else max_length
        self._tokenize = copy.deepcopy(tokenizer)  # the side is an attribute, and the caller's stays as it was
        self._tokenize.truncation_side = truncation_side
        self._turns = TurnTokens(tokenizer)
        self._opening = "".join(map(str, tokenizer.convert_ids_to_tokens(self._turns.opening_ids)))
        accepted = inspect.signature(model.forward).parameters
        self._inputs = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]

    def encode(self, texts: list[str], pairs: list[str] | None = None, **options: Any) -> list[dict[str, list[Any]]]:
        """Tokenize texts, or pairs of texts, and cut those that are too long. Lone surrogates are read as U+FFFD.

        :param options: passed on to the tokenizer
        :return: for each text its ``input_ids``, ``attention_mask`` and what else the tokenizer gives
        """
        if not texts:
            return []
        cut: dict[str, Any] = {}
        if self.max_length is not None:
            cut = {"truncation": True, "max_length": self.max_length}
        firsts = [well_formed(text) for text in texts]
        seconds = None if pairs is None else [well_formed(text) for text in pairs]
        encoded = self._tokenize(firsts, seconds, **cut, **options)
        rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]
        if seconds is None and self._turns.opening_ids and options.get("add_special_tokens", True):
            # A text that a chat template made begins with what the tokenizer puts there.
            for i, text in enumerate(firsts):
                if text.startswith(self._opening):
                    rows[i] = self._opened(text, options)
        return rows

    def _opened(self, text: str, options: dict[str, Any]) -> dict[str, list[Any]]:
        """A text that begins with the tokenizer's opening, which stays where the text is cut."""
        row: dict[str, list[Any]] = dict(self._tokenize(text, **{**options, "add_special_tokens": False}))
        before, behind = len(self._turns.opening_ids), self._turns.closing_ids
        length = len(row["input_ids"])
        kept = list(range(length))
        if self.max_length is not None and length + len(behind) > self.max_length:
            room = max(self.max_length - len(behind), before)
            left = self._tokenize.truncation_side == "left"
            kept = [*kept[:before], *kept[length - room + before :]] if left else kept[:room]
        closing: dict[str, list[Any]] = {"input_ids": behind, "attention_mask": [1] * len(behind)}
        closing |= {"token_type_ids": [0] * len(behind), "offset_mapping": [(0, 0)] * len(behind)}
        return {name: [values[i] for i in kept] + closing[name] for name, values in row.items()}

    @torch.inference_mode()
    def run(self, encoded: list[dict[str, list[Any]]]) -> Iterator[tuple[np.ndarray, Tensor, Any]]:
        """Forward texts, those of like length together; texts without a token are left out.

        :return: for each pass the indices of its texts ``(b,)``, their attention mask ``(b, L)`` and the model's output
        """
        self.model.eval()
        lengths = np.array([len(row["input_ids"]) for row in encoded], dtype=np.int64)
        for part in micro_batches(lengths, self.max_batch_tokens if self.pad_token_id is not None else 1):
            width = int(lengths[part].max())
            inputs = {}
            for name in self._inputs:
                if name not in encoded[part[0]]:
                    continue
                fill = self.pad_token_id or 0 if name == "input_ids" else 0
                rows = [list(encoded[i][name]) + [fill] * (width - int(lengths[i])) for i in part]
                inputs[name] = torch.tensor(rows, device=self.model.device)  # (b, L)
            yield part, inputs["attention_mask"], self.model(**inputs)


def readable_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens of a text that the model and its tokenizer are made for; None where neither says."""
    limits = [position_limit(model.config)]
    if tokenizer.model_max_length < 10**9:  # transformers writes 10**30 where a tokenizer names no limit
        limits.append(int(tokenizer.model_max_length))
    for name, module in model.named_modules():
        # RoBERTa counts positions from after that of the padding.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit is not None), default=None)


def open_pretrained(
    auto_class: Any,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str | torch.dtype,
    kind: str,
    optional: tuple[str, ...] = (),
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a checkpoint and its tokenizer.

    :param auto_class: such as ``AutoModelForSequenceClassification``
    :param path: a directory or the id of a model on the hub, or of an adapter
    :param tokenizer: by default the one saved with the model
    :param kind: what the checkpoint should be, for messages
    :param optional: beginnings of the names of weights that need not be there
    :param trust_remote_code: run Python code that comes with the checkpoint, where it has some
    :raises FileNotFoundError: if ``path`` is written as a path and is not a directory
    :raises ValueError: if weights are missing: they would be random
    """
    location = os.fspath(path)
    if isinstance(path, os.PathLike) or location.startswith((".", "~", os.sep)):
        location = str(Path(location).expanduser())
        if not os.path.isdir(location):
            raise FileNotFoundError(f"there is no directory {location!r} with {kind}")
    if os.path.isfile(location):
        raise FileNotFoundError(f"{location!r} is a file, not a directory with {kind}")
    if base := base_of_adapter(location):
        model = open_adapted(auto_class, location, base, resolve_dtype(dtype), kind)
        return model, tokenizer_of(location, base) if tokenizer is None else tokenizer
    try:
        with quiet_progress(), readable_weights(location):
            model, loading = auto_class.from_pretrained(
                location, dtype=resolve_dtype(dtype), output_loading_info=True, trust_remote_code=trust_remote_code
            )
    except OSError as e:
        raise ValueError(f"{location!r} can't be opened as {kind}: {first_line(e)}") from e
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(optional))
    if missing:
        raise ValueError(
            f"{location!r} is not {kind}: it has no weights for {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}"
        )
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    return model, tokenizer
