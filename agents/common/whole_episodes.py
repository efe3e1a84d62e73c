"""Agents that learn from whole episodes, several of each prompt where they compare completions with each other.

A rollout is a *round* (:meth:`~textgym.envs.TextGenVectorEnv.begin_round`): a fixed number of episodes, all of which
end within it. What such an agent adds is how the returns of a round become advantages, and its loss.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import EpisodeBuffer
from textgym.agents.common.arguments import LearningArguments
from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.common.text_environment import TextEnv, TextEnvironment
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_int
from textgym.envs.segments import Segment


class TextEpisodeAlgorithm(TextOnPolicyAlgorithm):
    """Rollouts of whole episodes, for agents whose advantages need their ends.

    Further arguments are those of :class:`~textgym.agents.common.on_policy.TextOnPolicyAlgorithm`, without ``n_steps``
    and others that say where a rollout is cut. The environment is an id or one vector environment, with nothing wrapped
    around it.

    :param episodes: in a rollout, E: a multiple of ``group_size``, and at least the number of rows; default one for
        each row. With more, a row that finishes early goes on with the next one instead of waiting for the longest
    :param group_size: completions of each prompt, K
    :param gae_lambda: λ of generalised advantage estimation, for agents that have a critic
    :param normalize_advantage: True: per minibatch; ``"rollout"``: over the rollout; False: not at all
    :param vf_coef: weight of the value loss, for agents that have a critic
    """

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        episodes: int | None = None,
        group_size: int = 1,
        gae_lambda: float = 1.0,
        normalize_advantage: bool | str = False,
        vf_coef: float = 0.0,
        **arguments: Unpack[LearningArguments],
    ) -> None:
        check_int("group_size", group_size, low=1)
        if episodes is not None:
            check_int("episodes", episodes, low=1)
        vec_env = self.make_vec_env(env)
        self.group_size = group_size
        self.episodes = episodes
        super().__init__(
            policy,
            vec_env,
            n_steps=1 if vec_env is None else self._most_steps(vec_env),
            gae_lambda=gae_lambda,
            normalize_advantage=normalize_advantage,
            vf_coef=vf_coef,
            **arguments,
        )

    def _most_steps(self, env: VecEnv) -> int:
        """Steps that a round takes at most, however long its episodes are and whichever row takes them.

        :raises ValueError: if the environment's rows can't share a round, or ``episodes`` does not fit them
        """
        environment = TextEnvironment(env)
        environment.check_rounds()
        rows = env.num_envs
        episodes = rows if self.episodes is None else self.episodes
        if episodes < rows or episodes % self.group_size:
            name = "episodes" if self.episodes is not None else "num_envs"
            raise ValueError(
                f"{name}={episodes} must be a multiple of group_size={self.group_size}"
                + (f" and at least num_envs={rows}" if self.episodes is not None else ", or episodes= be given")
            )
        longest = environment.max_actions
        # Rows are never idle while an episode is left (Graham 1969): what is left then takes one row its time.
        return longest if episodes == rows else (episodes * longest) // rows + longest

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Go on in another environment, with as many rows and the same spaces and token budget.

        :param env: whatever the constructor takes
        :param force_reset: whether to begin new episodes
        """
        vec_env = self.make_vec_env(env)
        assert vec_env is not None
        self.n_steps = self._most_steps(vec_env)
        super().set_env(vec_env, force_reset)
        if hasattr(self, "rollout_buffer"):
            self.rollout_buffer.rollout_steps = self.n_steps
            self.rollout_buffer.reset()

    def begin_rollout(self, environment: TextEnvironment) -> None:
        """Begin a round."""
        rows = environment.vec_env.num_envs
        self._last_obs = environment.begin_round(self.episodes or rows, self.group_size)
        self._last_episode_starts = np.ones(rows, dtype=bool)

    def units(self, buffer: EpisodeBuffer) -> list[list[Segment]]:
        """The completions of one prompt come in one minibatch together."""
        groups: dict[int, list[Segment]] = {}
        for segment in sorted(buffer.segments, key=lambda segment: segment.episode):
            groups.setdefault(segment.episode // self.group_size, []).append(segment)
        return list(groups.values())

    def rewards_to_go(self, buffer: EpisodeBuffer) -> tuple[list[Segment], np.ndarray]:
        """The episodes of a round in order, and the discounted rewards from each of their tokens on.

        :return: E segments, and ``(E, T)`` float64, 0 after an episode's end; column 0 has the returns
        """
        segments = sorted(buffer.segments, key=lambda segment: segment.episode)
        to_go = np.zeros((len(segments), max(segment.steps for segment in segments)))
        for row, segment in enumerate(segments):
            following = 0.0
            for t in reversed(range(segment.steps)):
                following = float(buffer.rewards[segment.start + t, segment.row]) + self.gamma * following
                to_go[row, t] = following
        return segments, to_go

    def turns(self, buffer: EpisodeBuffer, segments: list[Segment]) -> np.ndarray:
        """``(E, T)`` which turn of its episode each token of a round belongs to, from 0; -1 after an episode's end."""
        steps = np.array([segment.steps for segment in segments])
        turns = np.full((len(segments), steps.max()), -1, dtype=np.int64)
        turns[np.arange(turns.shape[1]) < steps[:, None]] = buffer.turns(segments)
        return turns

    def judged(self, segments: list[Segment]) -> np.ndarray:
        """``(E,)`` bool, which episodes of a round the reward said something about.

        Those for which it was None, "not applicable", are not part of a baseline and teach nothing.
        """
        unjudged = {(e["row"], e["step"]) for e in self.finished_episodes if not e.get("applies", True)}
        return np.array([(segment.row, segment.start + segment.steps - 1) not in unjudged for segment in segments])

    def fill(self, buffer: EpisodeBuffer, segments: list[Segment], advantages: np.ndarray, returns: np.ndarray) -> None:
        """Put advantages and returns, ``(E, T)`` each by episode, where the buffer has its transitions."""
        at = buffer.places(segments)
        inside = np.arange(advantages.shape[1]) < np.array([segment.steps for segment in segments])[:, None]
        buffer.advantages[at] = advantages[inside]
        buffer.returns[at] = returns[inside]

    def token_sums(self, values: Tensor, rows: np.ndarray, number: int) -> Tensor:
        """``(B,)`` sums over the tokens of each completion, or of other runs of tokens.

        :param values: ``(M,)``, one for each token
        :param rows: ``(M,)`` the completion that each belongs to
        :param number: B
        """
        sums = torch.zeros(number, dtype=values.dtype, device=values.device)
        return sums.index_add(0, torch.as_tensor(rows, device=values.device), values)
