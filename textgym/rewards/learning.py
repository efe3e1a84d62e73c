"""Rewards that learn while a policy is trained: a discriminator, a memory, running statistics.

Scoring never changes them. They change at one place only, :meth:`LearningReward.observe`, which gets complete texts
between two rollouts: so one text has one Φ within a rollout, instant and deferred scoring agree, and a resumed run goes
on exactly. In training :class:`textgym.agents.callbacks.learning_rewards.LearningRewards` calls it with the episodes
that ended; elsewhere :func:`learn_from` does.

A Φ that changes between rollouts is a dynamic potential: the first token after a change is paid Φ_new(s') − Φ_old(s),
which leaves the optimal policies as they are (Devlin and Kudenko, "Dynamic Potential-Based Reward Shaping", 2012). One
constant differs between the schedules: the prompt of an episode that begins with the last step of a rollout is scored
before learning with instant scoring, and after it with deferred scoring.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np

from textgym.rewards.base import Reward


class LearningReward(Reward):
    """A reward that learns from complete texts.

    What it learned belongs into :meth:`Reward.state_dict`.

        >>> class Longest(LearningReward):
        ...     '''Length over that of the longest text observed, in [0, 1] for texts that are no longer.'''
        ...     longest = 1
        ...     def __call__(self, *, prompts, completions, **columns):
        ...         return [len(text) / self.longest for text in completions]
        ...     def observe(self, *, prompts, completions, **columns):
        ...         self.longest = max(self.longest, *map(len, completions))
        >>> reward = Longest()
        >>> _ = learn_from(0.5 * reward, prompts=["a"], completions=["four"])
        >>> reward(prompts=["a"], completions=["of"])
        [0.5]
    """

    @abstractmethod
    def observe(self, *, prompts: list[str], completions: list[str], **columns: Any) -> None:
        """Learn from complete texts of the policy; scoring never does.

        :param prompts: B prompt texts
        :param completions: B completions
        :param columns: the extra columns of the prompt rows, each a list of length B
        """

    def metrics(self) -> dict[str, float]:
        """What to log after :meth:`observe`, by its key in the log."""
        return {}


def learn_from(
    reward: Reward, *, prompts: list[str], completions: list[str], columns: dict[str, list[Any]] | None = None
) -> list[LearningReward]:
    """Let every learning part of a reward learn from complete texts, each once, inner parts before those around them.

    A part that only some rows are routed to (:class:`~textgym.rewards.combining.router.Router`) sees those rows only.

    :param reward: any reward; one without learning parts is left as it is
    :param prompts: B prompt texts
    :param completions: B completions
    :param columns: the extra columns of the prompt rows, each a list of length B
    :return: the parts that learned, in that order
    :raises ValueError: if prompts, completions and columns differ in length
    """
    columns = columns or {}
    lengths = {"prompts": len(prompts), "completions": len(completions)}
    lengths.update({name: len(column) for name, column in columns.items()})
    if len(set(lengths.values())) > 1:
        raise ValueError(f"every list must have one entry for each text, got {lengths}")
    learners: dict[int, tuple[LearningReward, np.ndarray]] = {}  # with the rows that each sees, (B,) bool

    def visit(part: Reward, rows: np.ndarray) -> None:
        routed = getattr(part, "routed_rows", None)
        if routed is not None:
            rows = rows & routed(columns, len(prompts))
        for inner in getattr(part, "parts", ()):
            visit(inner, rows)
        if isinstance(part, LearningReward):
            known = learners.get(id(part))
            learners[id(part)] = (part, rows if known is None else known[1] | rows)

    visit(reward, np.ones(len(prompts), dtype=bool))
    for learner, rows in learners.values():
        chosen = np.flatnonzero(rows).tolist()
        if chosen:
            learner.observe(
                prompts=[prompts[i] for i in chosen],
                completions=[completions[i] for i in chosen],
                **{name: [column[i] for i in chosen] for name, column in columns.items()},
            )
    return [learner for learner, _ in learners.values()]


def has_learning_parts(reward: Reward) -> bool:
    """Whether a reward, or a part of it, learns."""
    return isinstance(reward, LearningReward) or any(map(has_learning_parts, getattr(reward, "parts", ())))
