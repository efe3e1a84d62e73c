"""The prompts of a run: those that it trains on, and those that it holds out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from textgym.agents.runs.config import RunConfig
from textgym.language_model import load_vocabulary
from textgym.prompts.files import load_prompt_file
from textgym.prompts.opening import as_prompt_source, split_prompts
from textgym.prompts.rows import PromptRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE_HELD_OUT = ("0", "none")


def load_prompts(config: RunConfig) -> tuple[PromptRows, PromptRows]:
    """Prompts to train on, and held-out ones; no text is in both.

    :return: twice the same, where nothing is held out: with ``held_out`` 0 or none, and by default where a tenth of the
        prompts is none
    :raises ValueError: if one of the two is empty or held-out prompts are among the others
    :warns UserWarning: if by default nothing is held out
    """
    train = _rows(config, config.prompts)
    held_out = config.held_out
    if held_out == "auto" and config.prompts == "train":
        held_out = "test"
    if held_out == "auto":
        different = len({row.prompt for row in train})
        if round(0.1 * different) == 0:
            warnings.warn(
                f"{different} different prompts are too few to hold some out: evaluations are on the training prompts. "
                "held_out= names others, or how many to hold out",
                UserWarning,
                stacklevel=2,
            )
            return train, train
        held_out = "0.1"
    if held_out in NONE_HELD_OUT:
        return train, train
    try:
        amount: float | int | None = int(held_out) if held_out.isdigit() else float(held_out)
    except ValueError:
        amount = None
    if amount is not None:
        return split_prompts(train, amount, config.split_seed)
    other = _rows(config, held_out)
    both = {row.prompt for row in train} & {row.prompt for row in other}
    if both:
        raise ValueError(
            f"{len(both)} of the prompts in held_out={held_out!r} are in prompts={config.prompts!r}, too, such as "
            f"{min(both)[:60]!r}: take them out of one of the two"
        )
    return train, other


def _rows(config: RunConfig, source: str) -> PromptRows:
    if source in ("train", "test"):
        embedded = as_prompt_source(source)
        assert isinstance(embedded, PromptRows)
        return embedded
    vocabulary = load_vocabulary(
        config.model,
        tokenizer=config.tokenizer,
        trust_remote_code=config.trust_remote_code,
        chat_template_kwargs=config.template_arguments(),
    )
    return rows_of_file(source, config, vocabulary.tokenizer)


class FileReading(Protocol):
    """How a file of prompts is read; see :class:`RunConfig`."""

    @property
    def prompt_column(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def drop_column(self) -> list[str] | None: ...
    @property
    def rename_column(self) -> list[str] | None: ...


def rows_of_file(source: str, reading: FileReading, tokenizer: PreTrainedTokenizerBase) -> PromptRows:
    """The prompts of a file, a folder or a data set of the hub.

    :param tokenizer: of the model that is to go on from them
    :raises ValueError: as :func:`~textgym.prompts.files.load_prompt_file`
    """
    return load_prompt_file(
        source,
        prompt_column=reading.prompt_column or "prompt",
        tokenizer=tokenizer,
        split=reading.split,
        drop_columns=reading.drop_column or (),
        rename_columns=_new_names(reading.rename_column),
    )


def _new_names(given: list[str] | None) -> Mapping[str, str]:
    """``["completions=answers"]`` as ``{"completions": "answers"}``.

    :raises ValueError: if one of them is something else
    """
    names = {}
    for text in given or []:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise ValueError(f"rename_column={text!r} must be OLD=NEW, such as completions=answers")
        names[old] = new
    return names
