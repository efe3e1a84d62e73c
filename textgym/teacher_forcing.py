"""The log-probabilities of tokens that are written already: one forward reads a text and says how likely each was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from textgym.language_model import LanguageModel

FORWARD_TOKENS = 16_384  # most padded tokens in one pass; bounds memory, not results
MASK_ELEMENTS = 2**25  # most entries of action masks held at once (32 MiB); bounds memory, not results


@torch.no_grad()
def forced_log_probs(
    model: LanguageModel,
    context: int,
    ids: np.ndarray,
    lengths: np.ndarray,
    prompt_lengths: np.ndarray,
    rows: np.ndarray,
    positions: np.ndarray,
    tokens: np.ndarray,
    temperature: float = 1.0,
    allowed: Callable[[np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Log-probabilities, in nats, of M tokens of B texts, in as few passes as memory allows.

    :param model: whose they are
    :param context: most tokens of a text
    :param ids: ``(B, L)`` token ids, right-padded
    :param lengths: ``(B,)`` how many of them are read
    :param prompt_lengths: ``(B,)`` how many of these are the prompt
    :param rows: ``(M,)`` the text of each token, in ascending order
    :param positions: ``(M,)`` the place in its text from which a token is predicted: the one before it
    :param tokens: ``(M,)`` the tokens
    :param temperature: divides the logits
    :param allowed: gives the action masks ``(m, V)`` bool of some of the M tokens, by their indices ``(m,)``; a token
        that was chosen against its mask is as unlikely as it was, not impossible
    :return: ``(M,)`` float64
    """
    log_probs = np.zeros(len(tokens))
    counts = np.bincount(rows, minlength=len(ids))  # (B,)
    ends = np.cumsum(counts)
    machine = model.cached(context)
    most = max(1, MASK_ELEMENTS // model.vocab_size) if allowed is not None else max(1, len(tokens))
    read = [row[:length] for row, length in zip(ids, np.where(counts > 0, lengths, 0), strict=True)]
    for part in machine.passes(read, FORWARD_TOKENS):
        at = np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in part])  # (m,)
        width = int(lengths[part].max())
        of = np.repeat(np.arange(len(part)), counts[part])
        hidden = machine.hidden_at(ids[part, :width], lengths[part], of, positions[at], prompt_lengths[part])
        for start in range(0, len(at), most):
            some = at[start : start + most]
            chosen = torch.as_tensor(tokens[some], device=hidden.device)
            mask = None
            if allowed is not None:
                mask = torch.as_tensor(allowed(some), device=hidden.device).scatter(1, chosen[:, None], True)
            found, _ = model.token_log_probs(
                hidden[start : start + most], chosen, temperature, mask, with_entropy=False
            )
            log_probs[some] = found.double().cpu().numpy()
    return log_probs
