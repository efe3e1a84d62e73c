"""Sampling from a language model: one token of many rows, or whole completions through the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from textgym.divergence import DivergedError
from textgym.episode_rules import EpisodeRules
from textgym.language_model import LanguageModel, log_distribution
from textgym.prompts.fitting import FittedPrompt
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply, ReplyResult
from textgym.sampling import SamplingSettings
from textgym.texts import Texts

if TYPE_CHECKING:
    from textgym.action_masks import ActionMasks


def sample_tokens(log_probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token of each row, by inverting the cumulative distribution.

    One random number a row is all it takes: the usual ways draw one for each token of the vocabulary, which on a CPU
    costs more than the forward of a small model.

    :param log_probs: ``(B, V)`` log-probabilities
    :param generator: source of randomness; default torch's global one
    :return: ``(B,)`` token ids
    :raises DivergedError: if the probabilities are not finite
    """
    cumulative = log_probs.exp().cumsum(dim=-1)  # (B, V)
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        raise DivergedError("probabilities of the next token are not finite")
    uniform = torch.rand(total.shape, generator=generator, device=total.device, dtype=total.dtype)
    # The first place that lies above is never one of probability 0, as long as some place does.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulative, torch.minimum(uniform * total, below_total), right=True).squeeze(-1)


class CompletedTexts(Texts):
    """Texts that are written from their prompts to their ends.

    ``reply_rewards`` has for each row what the reply paid for each of its turns.
    """

    def __init__(self, num_rows: int, context: int, rules: EpisodeRules, reply: Reply | None = None) -> None:
        super().__init__(num_rows, context, rules, reply)
        self.reply_rewards: list[list[float]] = [[] for _ in range(num_rows)]

    def answer(self, rows: np.ndarray) -> list[ReplyResult]:
        results = super().answer(rows)
        for row, result in zip(rows.tolist(), results, strict=True):
            self.reply_rewards[row].append(result.reward)
        return results


def append_tokens(
    texts: Texts,
    rows: np.ndarray,
    logits: Tensor,
    slots: np.ndarray,
    masks: ActionMasks | None = None,
    generator: torch.Generator | None = None,
    deterministic: bool = False,
) -> None:
    """Write the next token of some texts.

    :param rows: ``(B,)`` which of them
    :param logits: ``(B, V)`` of the model
    :param slots: ``(B,)`` where the rows live in the cache of the model that masks
    """
    allowed: Tensor | None = None
    if masks is not None:
        ids, lengths, prompt_lengths = texts.ids[rows], texts.lengths[rows], texts.prompt_lengths[rows]
        allowed = torch.as_tensor(
            masks.of(ids, lengths, prompt_lengths, slots, texts.turn_tokens[rows]), device=logits.device
        )
    log_probs = log_distribution(logits, texts.rules.sampling.temperature, allowed)
    tokens = log_probs.argmax(-1) if deterministic else sample_tokens(log_probs, generator)
    texts.append(rows, tokens.cpu().numpy())


@torch.no_grad()
def complete_texts(
    model: LanguageModel,
    prompts: Sequence[FittedPrompt],
    sampling: SamplingSettings,
    *,
    deterministic: bool = False,
    forbidden: Sequence[int] = (),
    masks: ActionMasks | None = None,
    generator: torch.Generator | None = None,
    reply: Reply | None = None,
    slots: np.ndarray | None = None,
) -> CompletedTexts:
    """Complete prompts, all rows side by side, each until it ends as it does in the environment.

    :param prompts: B of them, with their token ids
    :param sampling: temperature, limits and stop strings
    :param deterministic: take the most likely token instead of sampling
    :param forbidden: tokens that are never produced
    :param masks: what else may not be produced, state by state
    :param reply: who speaks after each turn, in the rows 0 to B-1, where episodes begin anew for it; None for texts of
        one turn
    :param slots: ``(B,)`` where the rows live in the model's cache, for prompts that go on from what was read and
        written there before; None for rows that are read from their first token
    :return: the B texts; they end with the token that ends a turn or completes a stop string, or with a reply
    :raises ReplyError: if the reply fails
    :raises ValueError: if the settings have limits of turns, and nobody replies
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    limits = None if reply is None else sampling.turn_limits(model.vocabulary.context_limit, longest)
    rules = EpisodeRules(model.vocabulary, sampling, limits)
    texts = CompletedTexts(len(prompts), longest + rules.max_total_tokens, rules, reply)
    for row, prompt in enumerate(prompts):
        texts.begin(row, *prompt)
    cached = model.cached(texts.context)
    running = np.arange(len(prompts))
    if slots is None:
        slots = running
        cached.forget(slots)  # what was cached before would show in the last bits, and so now and then in a token
        if masks is not None:
            masks.forget(slots, texts.context)
    if reply is not None:
        reply.begin(running)
    reordered = model.reordered_weights(len(prompts), sampling.max_new_tokens)
    while len(running):
        ids, lengths, prompt_lengths = texts.ids[running], texts.lengths[running], texts.prompt_lengths[running]
        with reordered:
            logits = model.head(cached.last_hidden(ids, lengths, slots[running], prompt_lengths))
        if forbidden:
            logits[:, list(forbidden)] = -torch.inf
        append_tokens(texts, running, logits, slots[running], masks, generator, deterministic)
        ended = [row for row in running.tolist() if texts.turn_reasons[row] is not None and not texts.done[row]]
        if reply is not None and ended:
            texts.answer(np.array(ended))
            texts.keep()
        running = np.flatnonzero(~texts.done)
    return texts


def complete(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, **settings: Any
) -> list[list[int]]:
    """Complete token prompts.

    :param prompts: B lists of token ids
    :param max_new_tokens: most tokens to add; a row ends earlier at a token that ends a turn, which is returned too
    :param settings: further ones of :class:`~textgym.sampling.SamplingSettings`, and what :func:`complete_texts` takes
    :return: B lists of completion token ids
    """
    how = {name: settings.pop(name) for name in _HOW if name in settings}
    sampling = SamplingSettings(max_new_tokens=max_new_tokens, **settings)
    fitted = [FittedPrompt(PromptRow(""), list(ids)) for ids in prompts]
    return complete_texts(model, fitted, sampling, **how).batch(np.arange(len(fitted))).completion_ids


_HOW = ("deterministic", "forbidden", "masks", "generator")
