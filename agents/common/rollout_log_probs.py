"""Log-probabilities of a whole rollout: of the trained weights where a copy acted, and of the reference model.

Each is one teacher-forced pass over the rollout's segments, or less.
"""

from __future__ import annotations

import numpy as np
import torch

from textgym.agents.buffers.episode_buffer import EpisodeBuffer
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.language_model import LanguageModel
from textgym.teacher_forcing import FORWARD_TOKENS, forced_log_probs


@torch.no_grad()
def evaluate_anew(policy: LanguageModelPolicy, buffer: EpisodeBuffer) -> None:
    """Put the trained weights' log-probabilities and values in the place of those of the copy that acted."""
    buffer.fix_drawn_with()
    segments = buffer.segments
    for part in policy.passes(segments, FORWARD_TOKENS):
        chosen = [segments[i] for i in part]
        at = buffer.places(chosen)
        values, log_prob, _ = policy.evaluate_segments(buffer.samples(chosen))
        buffer.values[at] = values.flatten().cpu().numpy()
        buffer.log_probs[at] = np.minimum(log_prob.cpu().numpy(), 0.0)  # a sure token may come out at +1e-7


def reference_log_probs(
    policy: LanguageModelPolicy, buffer: EpisodeBuffer, reference: LanguageModel, known: np.ndarray
) -> np.ndarray:
    """``(T, N)`` log-probabilities, in nats, of the buffer's actions under the reference model.

    :param policy: whose temperature and context hold
    :param known: ``(S, N)`` of the newest S steps, as scoring them needed it; NaN where it didn't
    """
    log_probs = np.zeros_like(buffer.log_probs)
    log_probs[buffer.held_steps : buffer.pos] = known
    segments = buffer.segments
    steps, rows = buffer.places(segments)
    if not buffer.held_steps and np.isfinite(log_probs[steps, rows]).all():
        return np.nan_to_num(log_probs)
    batch = buffer.samples(segments, with_masks=False)

    def allowed(which: np.ndarray) -> np.ndarray:
        masks = buffer.masks_at(steps[which], rows[which])
        assert masks is not None
        return masks

    log_probs[steps, rows] = forced_log_probs(
        reference,
        policy.context,
        batch.input_ids,
        batch.lengths,
        batch.prompt_lengths,
        batch.rows,
        batch.positions,
        buffer.actions[steps, rows, 0],
        policy.temperature,
        None if buffer.packed_masks is None else allowed,
    )
    return np.nan_to_num(log_probs)
