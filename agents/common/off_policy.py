"""What the value-based agents share that learn from old episodes: a replay of them, and a copy of the policy that lags.

An agent derives from :class:`TextOffPolicyAlgorithm` and adds its loss. A rollout fills the replay; the update draws
minibatches from it. One teacher-forced pass over an episode gives Q in all of its states, as it gives policy-gradient
agents their log-probs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from textgym.agents.buffers.episode_buffer import EpisodeBuffer, SegmentSamples
from textgym.agents.buffers.episode_replay import EpisodeReplay
from textgym.agents.common.arguments import RoundArguments
from textgym.agents.common.exploration import Exploration
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.common.whole_episodes import TextEpisodeAlgorithm
from textgym.agents.policy.lagging_policy import follow, lagging_copy, set_weights, weights_of
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.checks import check_int, check_number

if TYPE_CHECKING:
    from typing_extensions import Self


class TextOffPolicyAlgorithm(TextEpisodeAlgorithm):
    """Learning from a replay of whole episodes.

    Rewards are kept without the KL penalty, whose size changes with β and with the policy; an agent adds what its
    definition of Q asks for. ``save`` keeps the weights and the lagging copy, ``save_pretrained`` the weights alone,
    and neither the replay: a loaded agent begins an empty one. :class:`~textgym.agents.TrainingCheckpoints` keep all
    three, and a training that is resumed goes on exactly.

    Further arguments are those of :class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`.

    - ``replay``: the :class:`~textgym.agents.buffers.episode_replay.EpisodeReplay`, one in each process
    - ``target``: the lagging copy of the policy

    :param replay_episodes: most episodes in the replay
    :param batch_episodes: episodes of a minibatch and process; default as many as a rollout has
    :param gradient_steps: minibatches, each an optimizer step, after a rollout
    :param td_lambda: λ, from 0, the reward and the value of the next state, to 1, all that the episode earned; see
        :func:`~textgym.agents.common.bellman_targets.bellman_targets`
    :param tau: how far the lagging copy moves towards the weights, 1 all the way
    :param target_update_interval: after how many rollouts it does
    """

    replay: EpisodeReplay
    target: LanguageModelPolicy

    def __init__(
        self,
        policy: str | type[LanguageModelPolicy],
        env: TextEnv | None,
        *,
        replay_episodes: int = 1_000,
        batch_episodes: int | None = None,
        gradient_steps: int = 4,
        td_lambda: float = 0.0,
        gamma: float = 1.0,
        tau: float = 0.5,
        target_update_interval: int = 1,
        exploration: Exploration | None = None,
        **arguments: Unpack[RoundArguments],
    ) -> None:
        check_int("replay_episodes", replay_episodes, low=1)
        if batch_episodes is not None:
            check_int("batch_episodes", batch_episodes, low=1)
        check_int("gradient_steps", gradient_steps, low=1)
        check_number("td_lambda", td_lambda, low=0.0, high=1.0)
        check_number("tau", tau, low=0.0, high=1.0, open_low=True)
        check_int("target_update_interval", target_update_interval, low=1)
        self.replay_episodes = replay_episodes
        self.batch_episodes = batch_episodes
        self.gradient_steps = gradient_steps
        self.td_lambda = td_lambda
        self.tau = tau
        self.target_update_interval = target_update_interval
        super().__init__(
            policy,
            env,
            gamma=gamma,
            exploration=exploration,
            importance_cap=None,  # targets don't ask with which probability an action was drawn
            **arguments,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.processes.shard and self.processes.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} keeps a copy of the weights, which can't be made of sharded ones (FSDP): use a "
                "configuration without FSDP, such as ddp.yaml"
            )
        self.target = lagging_copy(self.policy)
        self.replay = EpisodeReplay(self.replay_episodes, self.observation_space, self.action_space, self.device)

    @property
    def kl_coef(self) -> float:
        """β, the environment's."""
        return self._environment.kl_coef

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL penalty, which the replay's rewards are free of."""
        return self.kl_coef > 0

    def compute_advantages(self, buffer: EpisodeBuffer, last_values: Tensor) -> None:
        """Put the rollout's episodes into the replay; there are no advantages."""
        rewards = buffer.rewards
        if self.kl_coef > 0:
            rewards = rewards + self.kl_coef * np.nan_to_num(buffer.kl)
        self.replay.add(buffer, rewards)

    def _minibatches(self, buffer: EpisodeBuffer) -> Iterator[SegmentSamples]:
        """Of the replay instead of the rollout; the same number in every process."""
        number = self.batch_episodes or self.episodes or self.n_envs
        for _ in range(self.gradient_steps):
            yield self.replay.sample(number)

    def train(self) -> None:
        """Update the policy with ``gradient_steps`` minibatches of the replay, and then the lagging copy."""
        super().train()
        if self._n_updates % self.target_update_interval == 0:
            follow(self.target, self.policy, self.tau)
        self.logger.record("train/replay_episodes", len(self.replay))

    # Saving

    def extra_state(self) -> dict[str, Any]:
        """The lagging copy, and the replay of each process."""
        return {
            "target": weights_of(self.target, self.policy),
            "replays": self.processes.gather(self.replay.state_dict()),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`extra_state` gave."""
        set_weights(self.target, state["target"])
        self.replay.load_state_dict(state["replays"][self.processes.rank])

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "replay"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names, variables = super()._get_torch_save_params()
        return [*names, "target"], variables

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        env: TextEnv | None = None,
        *,
        device: torch.device | str = "auto",
        **arguments: Any,
    ) -> Self:
        """Open an agent that ``save_pretrained`` wrote; its lagging copy begins equal to it, its replay empty.

        See :meth:`textgym.agents.TextOnPolicyAlgorithm.from_pretrained`.
        """
        model = super().from_pretrained(directory, env, device=device, **arguments)
        follow(model.target, model.policy)
        return model
