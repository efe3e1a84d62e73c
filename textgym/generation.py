"""Sampling from a language model: one token of many rows, or whole completions through the cache."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from textgym.chat.turns import TurnTokens
from textgym.divergence import DivergedError
from textgym.language_model import LanguageModel, log_distribution
from textgym.prompts.rows import PromptRow, as_columns
from textgym.rewards import PrefixBatch

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


@torch.no_grad()
def complete(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    deterministic: bool = False,
    forbidden: Sequence[int] = (),
    masks: ActionMasks | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Complete token prompts, all rows side by side.

    :param prompts: B lists of token ids
    :param max_new_tokens: most tokens to add; a row ends earlier at a token that ends a turn, which is returned too
    :param min_new_tokens: before that many tokens such a token ends nothing, as in the environment; masks, where there
        are some, keep it from being written
    :param temperature: divides the logits
    :param deterministic: take the most likely token instead of sampling
    :param forbidden: tokens that are never produced
    :param masks: what else may not be produced, state by state
    :return: B lists of completion token ids
    """
    context = max(len(ids) for ids in prompts) + max_new_tokens
    cached = model.cached(context)
    ids = np.zeros((len(prompts), context), dtype=np.int64)
    lengths = np.array([len(prompt) for prompt in prompts])
    prompt_lengths = lengths.copy()
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    running = np.arange(len(prompts))
    cached.forget(running)  # what was cached before would show in the last bits, and so now and then in a token
    if masks is not None:
        masks.forget(running, context)
    reordered = model.reordered_weights(len(prompts), max_new_tokens)
    ends = list(model.end_ids)
    for step in range(max_new_tokens):
        with reordered:
            logits = model.head(cached.last_hidden(ids[running], lengths[running], running, prompt_lengths[running]))
        if forbidden:
            logits[:, list(forbidden)] = -torch.inf
        allowed: Tensor | None = None
        if masks is not None:
            mask = masks.of(ids[running], lengths[running], prompt_lengths[running], running)
            allowed = torch.as_tensor(mask, device=logits.device)
        log_probs = log_distribution(logits, temperature, allowed)
        tokens = log_probs.argmax(-1) if deterministic else sample_tokens(log_probs, generator)
        chosen = tokens.cpu().numpy()
        ids[running, lengths[running]] = chosen
        lengths[running] += 1
        if step >= min_new_tokens:
            running = running[~np.isin(chosen, ends)]
        if not len(running):
            break
    return [
        row[len(prompt) : length].tolist() for row, prompt, length in zip(ids, prompts, lengths.tolist(), strict=True)
    ]


def complete_rows(
    model: LanguageModel,
    rows: Sequence[PromptRow],
    prompts: Sequence[Sequence[int]],
    *,
    min_new_tokens: int = 0,
    **sampling: Any,
) -> PrefixBatch:
    """Complete prompts and return prompts with completions in the form that rewards score.

    :param rows: B prompts with their columns
    :param prompts: their B lists of token ids
    :param min_new_tokens: see :func:`complete`
    :param sampling: its other arguments
    """
    completions = complete(model, prompts, min_new_tokens=min_new_tokens, **sampling)
    lengths = np.array([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    ids = np.full((len(rows), int(lengths.max())), model.pad_token_id, dtype=np.int64)
    for row, prompt, completion in zip(ids, prompts, completions, strict=True):
        row[: len(prompt) + len(completion)] = [*prompt, *completion]
    return PrefixBatch(
        input_ids=ids,
        lengths=lengths,
        prompt_lengths=np.array([len(prompt) for prompt in prompts]),
        finished=np.array([len(ids) > min_new_tokens and ids[-1] in model.end_ids for ids in completions]),
        rows=np.arange(len(rows)),
        prompts=[row.prompt for row in rows],
        columns=as_columns([row.columns for row in rows]),
        tokenizer=model.tokenizer,
        turns=model.vocabulary.turns,
    )


def cut_at_stop_strings(
    batch: PrefixBatch, stop: Sequence[str], min_new_tokens: int = 0
) -> tuple[PrefixBatch, np.ndarray]:
    """Completions up to the token that completes a stop string, as the environment ends them.

    :param batch: B complete texts
    :param stop: the strings; the token that completes one stays whole
    :param min_new_tokens: a stop string that is complete before so many tokens ends nothing
    :return: the batch, cut, and ``(B,)`` bool, where a stop string was found
    """
    whole = batch
    turns = batch.turns or TurnTokens(batch.tokenizer)
    batch = dataclasses.replace(batch, turns=turns.showing(stop))  # a stop string may be a special token
    lengths = batch.completion_lengths.copy()
    stopped = np.zeros(len(batch), dtype=bool)
    for row, completion in enumerate(batch.completions):
        if not any(text in completion for text in stop):
            continue
        count = int(lengths[row])
        searched = 0
        for tokens, text in enumerate(batch.at([row] * count, range(1, count + 1)).completions, start=1):
            found = any(string in text[max(0, searched - len(string) + 1) :] for string in stop)
            if found and tokens >= min_new_tokens:
                lengths[row], stopped[row] = tokens, True
                break
            searched = len(text)
    return (whole.at(range(len(batch)), lengths), stopped) if stopped.any() else (whole, stopped)


def token_texts(batch: PrefixBatch, row: int) -> list[str]:
    """What each token of a completion adds to its text; together they are the completion.

    Where several tokens make one character, the last of them adds it and the others add ``""``.

    :param batch: complete texts
    :param row: which of them
    """
    count = int(batch.completion_lengths[row])
    completion = batch.completions[row]
    ends = [0]
    for text in batch.at([row] * count, range(1, count + 1)).completions:
        common = next(
            (i for i, (a, b) in enumerate(zip(text, completion, strict=False)) if a != b),
            min(len(text), len(completion)),
        )
        ends.append(max(common, ends[-1]))
    ends[-1] = len(completion)
    return [completion[start:end] for start, end in itertools.pairwise(ends)]
