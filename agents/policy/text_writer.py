"""Texts that a policy's language model writes outside of any environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from textgym.action_masks import masks_of
from textgym.chat.chat_prompts import MESSAGES, chat_prompt
from textgym.chat.messages import as_messages, is_conversation
from textgym.generation import complete_texts
from textgym.language_model import LanguageModel
from textgym.prompts.fitting import as_chat, fit_prompt
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply, Transcript, aside
from textgym.replies.opening import as_reply
from textgym.rewards import PrefixBatch
from textgym.sampling import SamplingSettings

TRAINED_WITH = "trained"  # the reply of the environment that a policy was trained in


class TextWriter:
    """Writes texts as a policy was trained to, outside of any environment.

    - ``language_model``: what writes
    - ``sampling``: how, unless a call says otherwise
    - ``reference``: whose likeliest tokens top-k and top-p are, where the settings have them
    - ``reply``: who speaks after each turn; None for texts of one turn
    """

    language_model: LanguageModel
    sampling: SamplingSettings
    reference: LanguageModel | None = None
    reply: Reply | None = None

    def generate(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        max_new_tokens: int | None = None,
        deterministic: bool = False,
        temperature: float | None = None,
        seed: int | None = None,
        min_new_tokens: int | None = None,
        reference: LanguageModel | None = None,
        reply: Any = TRAINED_WITH,
        **settings: Any,
    ) -> list[str]:
        """Complete prompts as the policy was trained to: each until a token that ends a turn, or a stop string.

        What isn't given is as in :attr:`sampling`: masks, stop strings and limits of the environment trained in. Where
        somebody replied there, they do so here, too, until a text ends as an episode does.

        :param prompts: B texts or conversations. Where the environment's prompts were conversations, a plain text is
            what a user says (``chat=False`` leaves it as it is)
        :param max_new_tokens: most tokens written for each, in a turn
        :param deterministic: whether to take the most likely token every time
        :param temperature: divides the logits
        :param seed: for reproducible sampling; default the global torch random state
        :param min_new_tokens: no text ends before so many tokens
        :param reference: whose likeliest tokens top-k and top-p are; default the environment's reference model
        :param reply: who speaks after each turn; default the environment's ``reply``, None for texts of one turn
        :param settings: further ones of :class:`~textgym.sampling.SamplingSettings`, such as ``stop``, ``top_k`` or
            ``max_turns``
        :return: B completions: what the policy wrote. Where somebody replies, a line for each turn;
            :meth:`converse` says who said what
        :raises ValueError: if a prompt is empty or does not fit the model's context with its completion, a setting is
            impossible, top-k or top-p is set and there is no reference, or the policy was trained with a reply that
            isn't at hand
        """
        named = {"max_new_tokens": max_new_tokens, "temperature": temperature, "min_new_tokens": min_new_tokens}
        settings |= {name: value for name, value in named.items() if value is not None}
        texts = self._written(prompts, deterministic, seed, reference, reply, settings)
        return [] if texts is None else texts.completions

    def converse(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        deterministic: bool = False,
        seed: int | None = None,
        reference: LanguageModel | None = None,
        reply: Any = TRAINED_WITH,
        **settings: Any,
    ) -> list[Transcript]:
        """The same texts as of :meth:`generate`, as conversations.

        :return: B lists of messages after the prompts, ``{"role": ..., "content": ...}``; the policy's are the
            assistant's

        The parameters and what is raised: as for :meth:`generate`.
        """
        texts = self._written(prompts, deterministic, seed, reference, reply, settings)
        return [] if texts is None else texts.transcripts

    @torch.no_grad()
    def _written(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        deterministic: bool,
        seed: int | None,
        reference: LanguageModel | None,
        reply: Any,
        settings: dict[str, Any],
    ) -> PrefixBatch | None:
        speaker = self.reply
        if not (isinstance(reply, str) and reply == TRAINED_WITH):
            speaker = None if reply is None else as_reply(reply)
        elif speaker is None and self.sampling.in_turns:
            raise ValueError(
                "the policy was trained in texts in which somebody replies, and they are not saved with it: give "
                "reply=..., or reply=None for texts of one turn"
            )
        base = self.sampling.one_turn() if speaker is None else self.sampling
        sampling, lm = base.changed(**settings), self.language_model
        masks = masks_of(sampling, lm, self.reference if reference is None else reference)
        fitted = [fit_prompt(row, lm.vocabulary) for row in _as_rows(lm, prompts, sampling.chat)]
        if not fitted:
            return None
        generator = None if seed is None else torch.Generator(lm.device).manual_seed(seed)
        with aside(speaker, seed):
            texts = complete_texts(
                lm, fitted, sampling, deterministic=deterministic, masks=masks, generator=generator, reply=speaker
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
