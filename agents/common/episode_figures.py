"""What the log says of finished episodes."""

from __future__ import annotations

from typing import Any

import numpy as np

_LOGGED = ("r", "l", "score", "kl", "finish_reason", "is_success")


def logged_figures(episodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``rollout/*`` are made of; without the texts, because they are saved with the agent."""
    return [{name: e[name] for name in _LOGGED if name in e} for e in episodes if "r" in e]


def rollout_figures(episodes: list[dict[str, Any]], in_turns: bool = False) -> dict[str, float]:
    """Means over episodes of what is known of them: ``kl_ref`` and ``kl_ref_per_token`` in nats, ``score_mean``,
    ``eos_rate``, or in turns ``ended_by_reply``, and ``success_rate``.

    :param episodes: from :func:`logged_figures`
    :param in_turns: whether somebody replies in them
    """

    def values(name: str) -> np.ndarray:
        return np.array([e.get(name, np.nan) for e in episodes], dtype=np.float64)

    figures = {}
    kl, score = values("kl"), values("score")
    known = np.isfinite(kl)
    if known.any():
        figures["kl_ref"] = float(kl[known].mean())
        figures["kl_ref_per_token"] = float(kl[known].sum() / values("l")[known].sum())
    if np.isfinite(score).any():
        figures["score_mean"] = float(np.nanmean(score))
    reasons = [e["finish_reason"] for e in episodes if "finish_reason" in e]
    if reasons:
        name, ended = ("ended_by_reply", "reply") if in_turns else ("eos_rate", "eos")
        figures[name] = float(np.mean([reason == ended for reason in reasons]))
    successes = values("is_success")  # SB3's name for what some environments and wrappers say at an episode's end
    if np.isfinite(successes).any():
        figures["success_rate"] = float(np.nanmean(successes))
    return figures
