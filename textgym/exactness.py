"""How a causal language model can be stepped without changing its probabilities, found out by trying.

An architecture's name says little about what its code does with a cache, positions or padding. So a few tokens go
through the model the plain way and through the machinery when it is opened, and what differs is not used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from textgym.cached_model import CachedModel
from textgym.prefix_model import PrefixModel
from textgym.shared_weights import copy_sharing_weights
from textgym.vocabulary import context_limit

if TYPE_CHECKING:
    from textgym.language_model import LanguageModel

TOKENS = 8  # of the rows that are tried; less where the model's context is shorter
FAILURES = (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError)


@torch.no_grad()
def why_uncached(lm: LanguageModel) -> str | None:
    """Why the slot cache doesn't give this model's own probabilities; None where it does.

    :raises ValueError: if the model is none that predicts each token from those before it, or does more to its
        last hidden states than a linear layer
    """
    limit = context_limit(lm.model.config)
    plain = check_prefixes(lm, limit)  # (S, 2, H)
    ids, stages = _rows(lm, limit)
    expected = lm.model(input_ids=ids[1:, : stages[-1, 1]], use_cache=False).logits[0, -1].float()  # (V,)
    logits = lm.head(plain)  # (S, 2, V)
    error = _largest(logits[-1, 1] - expected)
    if not error <= _tolerance(lm, expected):
        raise ValueError(
            f"language_model={lm.name}: the logits of {type(lm.model).__name__} differ by {error:.2g} from its output "
            "layer applied to its last hidden states, and textgym computes them that way; use a decoder-only "
            "language model without further layers behind the last"
        )
    try:
        # Some models note in their modules what they did with a cache, and would read it in the next forward.
        stepper = CachedModel(copy_sharing_weights(lm.model), ids.shape[1])
        stepped = torch.stack([lm.head(stepper.last_hidden(ids, lengths)) for lengths in stages])
        whole = stepper.hidden_states(ids)  # (2, L, H)
        forced = torch.stack([lm.head(whole[[0, 1], lengths - 1]) for lengths in stages])
    except FAILURES as e:
        return f"a cache of keys and values can't drive it ({type(e).__name__}: {first_line(e)})"
    error = _largest(torch.stack([stepped - logits, forced - logits]))
    if error <= _tolerance(lm, logits):
        return None
    return f"with a cache of keys and values its logits differ by {error:.2g} from its plain forward"


@torch.no_grad()
def check_prefixes(lm: LanguageModel, limit: int | None) -> Tensor:
    """Make sure that forwards of rows padded on the right give the model's own hidden states at their real tokens.

    :param limit: most tokens of a row
    :return: ``(S, 2, H)`` the hidden states that were compared, from forwards of one row each
    :raises ValueError: if they don't
    """
    kind, advice = type(lm.model).__name__, "textgym needs a causal (decoder-only) language model"
    if getattr(lm.model.config, "is_encoder_decoder", False):
        raise ValueError(f"language_model={lm.name}: {kind} is an encoder-decoder model; {advice}")
    ids, stages = _rows(lm, limit)
    try:
        stepper = PrefixModel(lm.model, ids.shape[1])
        stepped = torch.stack([stepper.last_hidden(ids, lengths) for lengths in stages]).float()  # (S, 2, H)
        whole = stepper.hidden_states(ids)  # (2, L, H)
        forced = torch.stack([whole[[0, 1], lengths - 1] for lengths in stages]).float()
        plain = _each_alone(lm.model.base_model, ids, stages)
    except FAILURES as e:
        raise ValueError(
            f"language_model={lm.name}: {kind} can't be run on token ids alone ({type(e).__name__}: {first_line(e)}); "
            f"{advice}"
        ) from e
    error = _largest(torch.stack([stepped - plain, forced - plain]))
    if not error <= _tolerance(lm, plain):
        raise ValueError(
            f"language_model={lm.name}: the hidden states of {kind} change by {error:.2g} when tokens follow, as in "
            f"an encoder-only model such as BERT; {advice}"
        )
    return plain.to(lm.model.dtype)


def _rows(lm: LanguageModel, limit: int | None) -> tuple[Tensor, np.ndarray]:
    """Two rows of random tokens ``(2, L)``, and the lengths ``(S, 2)`` they have at each stage of a rollout."""
    longest = TOKENS if limit is None else min(limit, TOKENS)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, lm.vocab_size, (2, longest), generator=generator).to(lm.device)
    # Two rows are begun, then go on from different places with different numbers of tokens, then with one each.
    stages = np.array([[longest - 3, 1], [longest - 1, longest - 2], [longest, longest - 1]])
    return ids, stages.clip(1, longest)


def _each_alone(trunk: nn.Module, ids: Tensor, stages: np.ndarray) -> Tensor:
    """Hidden states at the last token of each row, ``(S, 2, H)``; no padding, no cache, one row at a time."""
    parts = [
        trunk(input_ids=ids[row : row + 1, :length], use_cache=False).last_hidden_state[0, -1]
        for lengths in stages.tolist()
        for row, length in enumerate(lengths)
    ]
    return torch.stack(parts).view(len(stages), 2, -1).float()


def _tolerance(lm: LanguageModel, values: Tensor) -> float:
    """Rounding differs between forwards of different shapes; a wrong mask or position shows in the first digit."""
    if lm.model.dtype != torch.float32:
        relative = 5e-2
    else:  # TF32 and the like round to three digits
        relative = 3e-4 if torch.get_float32_matmul_precision() == "highest" else 1e-2
    return relative * float(values.abs().max())


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def first_line(error: Exception) -> str:
    """The first line of an error message without its last mark, for putting it into another."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(" .:")
