"""Completing prompts with a policy's language model, outside of any environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from textgym.action_masks import ActionMasks
from textgym.chat.chat_prompts import MESSAGES, chat_prompt
from textgym.chat.messages import as_messages, is_conversation
from textgym.generation import complete_texts
from textgym.language_model import LanguageModel
from textgym.prompts.fitting import as_chat, fit_prompt
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply, aside
from textgym.rewards import PrefixBatch
from textgym.sampling import SamplingSettings


def complete_prompts(
    lm: LanguageModel,
    prompts: Sequence[str | Sequence[Mapping[str, Any]]],
    sampling: SamplingSettings,
    masks: ActionMasks | None,
    deterministic: bool,
    seed: int | None,
    reply: Reply | None = None,
) -> PrefixBatch | None:
    """Texts that go on where the prompts end, each until a token that ends a turn, or a stop string.

    :param lm: what writes
    :param prompts: B texts or conversations
    :param sampling: how
    :param masks: tokens that may be chosen; None for all
    :param deterministic: whether to take the most likely token every time
    :param seed: of the sampling; None for torch's global random state
    :param reply: who speaks after each turn; None for texts of one turn
    :return: B texts; None where B is 0
    """
    fitted = [fit_prompt(row, lm.vocabulary) for row in _as_rows(lm, prompts, sampling.chat)]
    if not fitted:
        return None
    generator = None if seed is None else torch.Generator(lm.device).manual_seed(seed)
    with aside(reply, seed):
        texts = complete_texts(
            lm, fitted, sampling, deterministic=deterministic, masks=masks, generator=generator, reply=reply
        )
    return texts.batch(np.arange(len(fitted)))


def _as_rows(lm: LanguageModel, prompts: Sequence[Any], chat: bool) -> list[PromptRow]:
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of texts; for one text pass [{prompts!r}]")
    rows = []
    for i, prompt in enumerate(prompts):
        if is_conversation(prompt):
            messages = as_messages(prompt, f"prompts[{i}]")
            rows.append(PromptRow(chat_prompt(messages, lm.tokenizer, f"prompts[{i}]"), {MESSAGES: messages}))
            continue
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{i}] is a {type(prompt).__name__}, expected a text or a list of messages")
        if not prompt:
            raise ValueError(f"prompts[{i}]={prompt!r} has no tokens: a prompt needs at least one")
        row = PromptRow(prompt)
        rows.append(as_chat(row, lm.vocabulary) if chat else row)
    return rows
