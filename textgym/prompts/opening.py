"""Whatever a user may pass as ``prompts=``, opened: lists, rows, data sets, files and functions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.checks import check_int
from textgym.prompts.row_files import LocatedRows, names_rows, plain_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

from textgym.prompts.files import load_prompt_file
from textgym.prompts.reading import PromptFunction, read_prompt, rows_of_prompts
from textgym.prompts.rows import PromptRow, PromptRows, PromptSource, filled


def as_prompt_source(obj: Any, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptSource:
    """Turn what a user may pass as ``prompts=`` into a :class:`PromptSource`.

    :param obj: a list or tuple of prompts, each a text or a conversation; a list of rows, dicts with a ``"prompt"`` or
        in another layout of :mod:`textgym.prompts.layouts` (or :class:`PromptRow`); a ``datasets.Dataset`` of such
        rows, or a stream of at most 100,000; a function ``f(rng)`` that makes one; the path of a file or folder that
        :func:`~textgym.prompts.files.load_prompt_file` reads, as a ``Path`` or a string; ``"train"`` or ``"test"`` for
        the embedded prompts; or None for the embedded training prompts
    :param tokenizer: of the language model; its chat template turns conversations into prompts
    :raises TypeError: for anything else, or a prompt that is neither text nor messages
    :raises ValueError: if there are no prompts, one is empty or has no tokens, or a column has a name that rewards are
        called with anyway
    :raises FileNotFoundError: if there is no such file
    """
    if isinstance(obj, PromptSource):
        return obj
    if obj is None or (isinstance(obj, str) and obj in ("train", "test")):
        from textgym import embedded

        texts = embedded.load_prompts("test" if obj == "test" else "train")
        return PromptRows([{"prompt": text} for text in texts])
    if isinstance(obj, (str, os.PathLike)):
        if isinstance(obj, os.PathLike) or names_rows(obj):
            return load_prompt_file(obj, tokenizer=tokenizer)
        raise TypeError(
            f"prompts={obj!r} is a single text; pass a list, [{obj!r}], the path of a file, 'train' or 'test' for the "
            "embedded prompts, or textgym.prompts.files.load_prompt_file(...) for a data set on the hub"
        )
    if hasattr(obj, "column_names") and hasattr(obj, "__iter__"):
        return rows_of_prompts(
            LocatedRows(plain_dataset(obj, "prompts"), "prompts[{}]", "prompts"), tokenizer=tokenizer
        )
    if isinstance(obj, Sequence) and not isinstance(obj, (bytes, bytearray)):
        return _from_sequence(obj, tokenizer)
    if callable(obj) and not isinstance(obj, type):
        return PromptFunction(obj, tokenizer)
    raise TypeError(
        "prompts must be a list of texts, a list of conversations, a list of dicts with a 'prompt', a datasets.Dataset "
        "with a column 'prompt', a function f(rng) -> str | dict, the path of a file, 'train', 'test' or None; "
        f"got {type(obj).__name__}"
    )


def split_prompts(
    source: Any, held_out: float | int = 0.1, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PromptRows, PromptRows]:
    """Divide prompts into those to train on and those to evaluate on, so that no prompt is in both.

    What counts is the prompt's text: rows with the same text stay together, whatever their other columns. Texts are
    ordered by a hash of the text and the seed and the first are held out, so the same texts are held out on every
    machine, whatever the order of the rows.

    :param source: whatever :func:`as_prompt_source` takes, except functions
    :param held_out: the share of the different texts to hold out, rounded to a whole number of texts; or, as a whole
        number, how many
    :param seed: another one holds out other texts
    :param tokenizer: of the language model; needed for conversations that aren't texts yet
    :return: training rows and held-out rows, each in the order of the source
    :raises TypeError: if the source is a function, whose prompts can't be counted, or an argument is not a number
    :raises ValueError: if either part would be empty

    >>> train, held_out = split_prompts(["a", "b", "c", "a"], held_out=1)
    >>> sorted(row.prompt for row in train), sorted(row.prompt for row in held_out)
    (['b', 'c'], ['a', 'a'])
    """
    rows = as_prompt_source(source, tokenizer)
    if not isinstance(rows, PromptRows):
        raise TypeError(f"a {type(rows).__name__} has no fixed prompts to divide; give two functions, or a list")
    check_int("seed", seed, low=0)
    if isinstance(held_out, bool) or not isinstance(held_out, int | float | np.integer):
        raise TypeError(f"held_out={held_out!r} must be a share between 0 and 1 or a whole number of prompts")
    texts = [row.prompt for row in rows]
    different = set(texts)
    whole = isinstance(held_out, int | np.integer)
    if not (held_out >= 1 if whole else 0 < held_out < 1):
        raise ValueError(
            f"held_out={held_out!r} must be a share greater than 0 and less than 1, or a whole number of prompts, "
            "at least 1"
        )
    count = int(held_out) if whole else round(held_out * len(different))
    if not 0 < count < len(different):
        part = "held-out" if count == 0 else "training"
        raise ValueError(
            f"held_out={held_out!r} of {len(different)} different prompts leaves none in the {part} part; "
            f"give a whole number from 1 to {len(different) - 1}"
            if len(different) > 1
            else f"held_out={held_out!r}: there is only one prompt, {texts[0][:60]!r}, which can't be in both parts"
        )

    def rank(text: str) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{text}".encode("utf-8", "surrogatepass"), digest_size=16).digest(), text

    chosen = set(sorted(different, key=rank)[:count])
    train = [i for i, text in enumerate(texts) if text not in chosen]
    kept = [i for i, text in enumerate(texts) if text in chosen]
    return rows.chosen(train), rows.chosen(kept)


def _from_sequence(obj: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None) -> PromptSource:
    texts = len(obj) > 0 and isinstance(obj[0], str)
    rows = []
    for i, item in enumerate(obj):
        where = f"prompts[{i}]"
        if texts and not isinstance(item, str):
            raise TypeError(f"{where} must be a text, as prompts[0] is, got {type(item).__name__}")
        rows.append(read_prompt(PromptRow(item) if texts else item, where, tokenizer))
    return PromptRows(filled(rows))
