"""The model that is trained: opening a backbone with a new linear head, tokens of texts and their prefixes, forward.

A causal model reads a complete text with an end-of-sequence token behind it, as
:class:`~textgym.rewards.CausalRewardModel` does; an unfinished one stands without. An encoder reads each with the
special tokens that its tokenizer puts around a text.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from textgym.language_model import quiet_progress
from textgym.rewards.text_forward import readable_tokens


@dataclass(frozen=True)
class EncodedText:
    """The tokens of a text: ``head`` + ``completion`` + ``tail``.

    :param head: tokens of the prompt, with the special tokens before it
    :param completion: tokens of the completion
    :param tail: special tokens behind a complete text
    :param prefix_tail: special tokens behind a text that goes on
    """

    head: list[int]
    completion: list[int]
    tail: list[int]
    prefix_tail: list[int]

    @property
    def ids(self) -> list[int]:
        return self.head + self.completion + self.tail

    def prefix(self, length: int) -> list[int]:
        """The tokens of the text that ends, for now, after ``length`` tokens of the completion."""
        return self.head + self.completion[:length] + self.prefix_tail

    @property
    def shortest(self) -> int:
        """Fewest tokens of the completion that leave anything to read."""
        return 0 if self.head else min(1, len(self.completion))


def open_backbone(
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    num_labels: int,
    seed: int,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier and its tokenizer; a head that the checkpoint lacks is drawn at random.

    :param model: ``"embedded"`` (textgym's language model), ``"minilm"``, a directory, a hub id, or a sequence
        classifier, which is trained in place
    :param tokenizer: by default the one saved with the model; needed with an object
    :param num_labels: outputs of the head
    :param seed: of the new head
    :raises FileNotFoundError: if ``model`` is written as a path and is not a directory
    :raises ValueError: if an object has no tokenizer or another number of outputs, or weights other than the head's
        are missing
    :raises TypeError: if ``model`` is an object of another kind
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError(f"model is a {type(model).__name__} object: pass its tokenizer too (tokenizer=...)")
        if not type(model).__name__.endswith("ForSequenceClassification"):
            raise TypeError(f"model is a {type(model).__name__}; give a sequence classifier, or a directory or hub id")
        if model.config.num_labels != num_labels:
            raise ValueError(f"model has num_labels={model.config.num_labels}; the data and the loss need {num_labels}")
        return model, tokenizer
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a name, a directory or a sequence classifier, got {type(model).__name__}")
    path = os.fspath(model)
    if path == "embedded":
        from textgym.embedded import LANGUAGE_MODEL

        path = str(LANGUAGE_MODEL)
    elif path == "minilm":
        from textgym.minilm import minilm_directory

        path = str(minilm_directory())
    if isinstance(model, os.PathLike) or path.startswith((".", "~", os.sep)):
        path = str(Path(path).expanduser())
        if not os.path.isdir(path):
            raise FileNotFoundError(f"model={os.fspath(model)!r}: there is no such directory")
    set_seed(seed)
    with quiet_progress(), _quiet_loading():
        opened, loading = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=num_labels, dtype=torch.float32, output_loading_info=True
        )
    trunk = opened.base_model_prefix + "."
    missing = sorted(name for name in loading["missing_keys"] if name.startswith(trunk) and ".pooler." not in name)
    if missing:
        raise ValueError(f"model={path!r} has no weights for {', '.join(missing[:3])}; its backbone would be random")
    return opened, AutoTokenizer.from_pretrained(path) if tokenizer is None else tokenizer


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without transformers' report on a head that the checkpoint lacks: what is missing is checked here."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


class TextScorer:
    """Texts to tokens, tokens to the outputs of the model.

    :param max_length: most tokens of a text; longer ones lose tokens at their beginning. By default what the model can
        read, and at most 512
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> None:
        readable = readable_tokens(model, tokenizer)
        if max_length is None:
            max_length = min(512, readable or 512)
        if max_length < 4 or (readable is not None and max_length > readable):
            raise ValueError(f"max_length={max_length} must be from 4 to {readable}, which is what the model can read")
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.causal = is_causal(model)
        # PAD is never read: neither the attention mask nor the position of the end depends on it.
        self._pad = tokenizer.pad_token_id or 0

    def encode(self, prompts: Sequence[str], completions: Sequence[str]) -> tuple[list[EncodedText], int]:
        """Tokens of texts; prompt and completion are tokenized as one text, as rewards do.

        :return: the tokens, and how many texts were longer than ``max_length`` and lost their beginning
        """
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        whole = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        alone = self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"]
        special, eos = set(self.tokenizer.all_special_ids), self.tokenizer.eos_token_id
        encoded, cut = [], 0
        for ids, prompt_ids, prompt in zip(whole, alone, prompts, strict=True):
            stop = len(ids)
            if self.causal:
                while stop and ids[stop - 1] == eos:  # some tokenizers add one to everything
                    stop -= 1
            else:
                while stop and ids[stop - 1] in special:
                    stop -= 1
            tail = ([] if eos is None else [eos]) if self.causal else ids[stop:]
            start = 0
            while start < min(stop, len(prompt_ids)) and ids[start] == prompt_ids[start]:
                start += 1
            begin = 0  # special tokens at the beginning, which stay where a text is cut
            while begin < start and ids[begin] in special:
                begin += 1
            if not prompt:
                start = begin
            room = self.max_length - begin - len(tail)
            first = max(begin, stop - room)
            cut += first > begin
            encoded.append(
                EncodedText(
                    ids[:begin] + ids[first : max(first, start)],
                    ids[max(first, start) : stop],
                    tail,
                    [] if self.causal else tail,
                )
            )
        return encoded, cut

    def tensors(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, each ``(B, L)``, padded on the right."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        device = self.model.device
        return ids.to(device), mask.to(device)

    def at_end(self, rows: Sequence[Sequence[int]], frozen: bool = False) -> Tensor:
        """Logits ``(B, C)`` of rows of token ids."""
        if self.causal:
            logits, _ = self.everywhere(rows, frozen)
            return logits[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])]
        ids, mask = self.tensors(rows)
        return self.model(input_ids=ids, attention_mask=mask).logits.float()

    def everywhere(self, rows: Sequence[Sequence[int]], frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Logits ``(B, L, C)`` of a causal model at every token, and the mask ``(B, L)`` of those there are.

        :param frozen: whether no gradient is to go into the backbone
        """
        ids, mask = self.tensors(rows)
        options: dict[str, Any] = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        with torch.no_grad() if frozen else contextlib.nullcontext():
            hidden = self.model.base_model(input_ids=ids, attention_mask=mask, **options).last_hidden_state  # (B, L, H)
        return self.model.score(hidden).float(), mask

    @torch.no_grad()
    def logits(self, rows: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
        """Logits ``(N, C)`` of any number of rows, in evaluation mode, on the CPU."""
        training = self.model.training
        self.model.eval()
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        result = torch.zeros(len(rows), self.model.config.num_labels)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            result[part] = self.at_end([rows[i] for i in part]).cpu()
        self.model.train(training)
        return result


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether it has a head called ``score``, and no token of it sees those behind it."""
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return False
    training = model.training
    model.eval()
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.arange(1, 7, device=model.device).remainder(vocabulary)[None]  # (1, 6)
    other = ids.clone()
    other[0, -1] = (int(ids[0, -1]) + vocabulary // 2) % vocabulary
    first, second = (model.base_model(input_ids=x).last_hidden_state[0, 0] for x in (ids, other))
    model.train(training)
    return bool(torch.equal(first, second)) or bool(torch.allclose(first, second, atol=1e-5))
