"""Log-probabilities of a whole rollout: of the trained weights, of what its tokens were drawn from, of the reference.

Each is one teacher-forced pass over the rollout's segments, or less.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, Segment
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.engine.micro_batches import micro_batches
from textgym.language_model import LanguageModel
from textgym.teacher_forcing import FORWARD_TOKENS, forced_log_probs


@torch.no_grad()
def evaluate_anew(policy: LanguageModelPolicy, buffer: EpisodeBuffer) -> None:
    """Put the trained weights' log-probabilities and values in the place of those of the copy that acted."""
    buffer.fix_drawn_with()
    for part in _in_parts(buffer.segments):
        values, log_prob, _ = policy.evaluate_segments(buffer.samples(part))
        at = buffer.places(part)
        buffer.values[at] = values.flatten().cpu().numpy()
        buffer.log_probs[at] = np.minimum(log_prob.cpu().numpy(), 0.0)  # a sure token may come out at +1e-7


def weigh(buffer: EpisodeBuffer, importance_cap: float | None) -> np.ndarray:
    """Weigh tokens by their probability under the policy over that under what they were drawn from.

    :param importance_cap: the largest weight; None for no weights
    :return: ``(T, N)`` logarithms of these ratios, nats, before the cap
    """
    drawn_with = buffer.fix_drawn_with()
    log_ratio = np.where(buffer.active, buffer.log_probs - drawn_with, 0.0).astype(np.float32)
    if importance_cap is not None:
        buffer.importance = np.minimum(np.exp(log_ratio), importance_cap)
    return log_ratio


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


def _in_parts(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Segments of like length together, so few that a forward over them fits."""
    for part in micro_batches([segment.length for segment in segments], FORWARD_TOKENS):
        yield [segments[i] for i in part]
