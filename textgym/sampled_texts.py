"""Texts that are sampled to be measured: batches of them, and how likely their tokens were."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from textgym.action_masks import ActionMasks
from textgym.checks import check_int
from textgym.generation import complete_texts
from textgym.language_model import LanguageModel
from textgym.prompts.fitting import FittedPrompt, as_chat, fit_prompt
from textgym.prompts.opening import as_prompt_source
from textgym.prompts.rows import PromptRow, PromptRows
from textgym.replies.base import Reply
from textgym.rewards import PrefixBatch
from textgym.sampling import SamplingSettings
from textgym.teacher_forcing import forced_log_probs

# Also whatever else as_prompt_source takes and has an end, such as the path of a file.
Prompts: TypeAlias = Sequence[str] | Sequence[PromptRow] | Sequence[Mapping[str, Any]] | PromptRows


class SampledTexts(NamedTuple):
    """B texts, why each of them ended, and what the reply paid for each turn, if somebody replied."""

    batch: PrefixBatch
    finish_reasons: list[str]
    reply_rewards: list[list[float]]


def sampled_texts(
    sampling: SamplingSettings,
    masks: ActionMasks | None,
    model: LanguageModel,
    rows: Sequence[PromptRow],
    reply: Reply | None,
    batch_size: int,
    seed: int,
    deterministic: bool = False,
) -> Iterator[SampledTexts]:
    """Complete prompts in batches.

    :param sampling: how; limits of turns that are left open get their defaults
    :param reply: who speaks after each turn; None for texts of one turn
    :raises ValueError: if a prompt does not fit, or a setting is impossible
    """
    check_int("batch_size", batch_size, low=1)
    fitted = _fitted(sampling, model, rows, reply is not None)  # all of them before the first is completed
    if reply is not None:
        longest = max((len(prompt.ids) for prompt in fitted), default=0)
        sampling = sampling.with_turns(sampling.turn_limits(model.vocabulary.context_limit, longest))
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for start in range(0, len(fitted), batch_size):
        part = fitted[start : start + batch_size]
        texts = complete_texts(
            model, part, sampling, deterministic=deterministic, masks=masks, generator=generator, reply=reply
        )
        batch = texts.batch(np.arange(len(part)))
        yield SampledTexts(batch, [str(reason) for reason in texts.finish_reasons], texts.reply_rewards)


def rows_of(prompts: Any, model: LanguageModel) -> list[PromptRow]:
    """Prompts of whatever kind, as rows.

    :raises TypeError: if they have no end
    """
    source = as_prompt_source(prompts, model.tokenizer)
    if not isinstance(source, PromptRows):
        raise TypeError(f"prompts is a {type(source).__name__}, which has no end; give a list of prompts")
    return list(source)


def check_reference(model: LanguageModel, reference: LanguageModel) -> None:
    """:raises ValueError: if the two don't have the same tokens"""
    if reference is not model and (
        reference.vocab_size != model.vocab_size or reference.tokenizer.get_vocab() != model.tokenizer.get_vocab()
    ):
        raise ValueError(
            f"the reference {reference.name} has another vocabulary than the model {model.name}: KL and perplexity "
            "compare the same tokens; give the model that training started from"
        )


def completion_log_probs(
    model: LanguageModel, batch: PrefixBatch, temperature: float = 1.0, masks: ActionMasks | None = None
) -> np.ndarray:
    """Log-probability of each completion given its prompt, ``(B,)`` in nats, from one teacher-forced pass."""
    return np.array([log_probs.sum() for log_probs in token_log_probs(model, batch, temperature, masks)])


def token_log_probs(
    model: LanguageModel, batch: PrefixBatch, temperature: float = 1.0, masks: ActionMasks | None = None
) -> list[np.ndarray]:
    """Log-probability of each token of B completions, in nats, from one teacher-forced pass.

    :param masks: what the distributions are restricted to; a token that was chosen against them is treated as allowed
    :return: B arrays ``(T,)`` float64, of the tokens that the model wrote: not of replies
    """
    return log_probs_of((model,), batch, temperature, masks)[0]


@torch.no_grad()
def log_probs_of(
    models: Sequence[LanguageModel], batch: PrefixBatch, temperature: float, masks: ActionMasks | None
) -> list[list[np.ndarray]]:
    """:func:`token_log_probs` of several models, under the same masks."""
    places = [batch.action_positions(row) for row in range(len(batch))]
    counts = [len(place) for place in places]
    rows, at = np.repeat(np.arange(len(batch)), counts), np.concatenate(places)
    tokens = batch.input_ids[rows, at]  # (M,)

    written = np.concatenate([batch.tokens_before_in_turn(row) for row in range(len(batch))])
    restricting = None
    if masks is not None and masks.model is not None:
        machine = masks.model.cached(batch.input_ids.shape[1])
        restricting = machine.hidden_at(batch.input_ids, batch.lengths, rows, at - 1, batch.prompt_lengths)  # (M, H)

    def allowed(which: np.ndarray) -> np.ndarray:
        assert masks is not None
        return masks.at(written[which], None if restricting is None else restricting[which])

    found = []
    for model in models:
        log_probs = forced_log_probs(
            model,
            batch.input_ids.shape[1],
            batch.input_ids,
            batch.lengths,
            batch.prompt_lengths,
            rows,
            at - 1,
            tokens,
            temperature,
            None if masks is None else allowed,
        )
        found.append(np.split(log_probs, np.cumsum(counts)[:-1]))
    return found


def _fitted(
    sampling: SamplingSettings, model: LanguageModel, rows: Sequence[PromptRow], replies: bool
) -> list[FittedPrompt]:
    """The prompts as the model sees them."""
    if sampling.chat:
        rows = [as_chat(row, model.vocabulary) for row in rows]
    fitted = [fit_prompt(row, model.vocabulary, sampling.max_prompt_tokens) for row in rows]
    limit = model.vocabulary.context_limit
    name = "max_new_tokens" if not replies or sampling.max_total_tokens is None else "max_total_tokens"
    budget = int(getattr(sampling, name))
    for row, ids in fitted:
        if limit is not None and len(ids) + budget > limit:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {name}={budget} are together more than "
                f"the context of {limit} tokens that {model.name} has: {row.prompt[:60]!r}..."
            )
    cut = [row.prompt for row, (kept, _) in zip(rows, fitted, strict=True) if kept is not row]
    if cut:
        warnings.warn(
            f"{len(cut)} of {len(rows)} prompts are longer than max_prompt_tokens={sampling.max_prompt_tokens} and "
            f"were cut on the left, or in their oldest turns, such as {cut[0][:60]!r}...",
            stacklevel=4,
        )
    return fitted
