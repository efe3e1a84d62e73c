"""Prefix batches for the tests of rewards."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from textgym.rewards import PrefixBatch


def prefix_batch(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    completions: list[list[int]],
    *,
    pad: int | None = None,
    width: int | None = None,
    **columns: list[Any],
) -> PrefixBatch:
    """A batch of prompts and completions given as token ids.

    :param pad: what fills up short rows; by default the padding token
    :param width: tokens of the padded rows; by default those of the longest
    """
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    width = width or max(map(len, rows), default=0)
    pad = tokenizer.pad_token_id if pad is None else pad
    padded = [row + [pad] * (width - len(row)) for row in rows]
    return PrefixBatch(
        input_ids=np.array(padded, dtype=np.int64).reshape(len(rows), width),
        lengths=np.array([len(row) for row in rows], dtype=np.int64),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], dtype=np.int64),
        finished=np.array([bool(c) and c[-1] == tokenizer.eos_token_id for c in completions], dtype=bool),
        rows=np.arange(len(rows)),
        prompts=[tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts],
        columns=columns,
        tokenizer=tokenizer,
    )


def text_batch(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], completions: list[str], **columns: list[Any]
) -> PrefixBatch:
    """A batch of prompts and completions given as texts."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return prefix_batch(tokenizer, list(map(ids, prompts)), list(map(ids, completions)), **columns)


def all_lengths(batch: PrefixBatch) -> list[np.ndarray]:
    """For each row every completion length, from 0 to all of it."""
    return [np.arange(length + 1) for length in batch.completion_lengths]
