"""What an agent asks of the text environment below a ``VecEnv``, whatever is wrapped around it."""

from __future__ import annotations

import contextlib
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from textgym.envs import RolloutScores, TextGenVectorEnv
from textgym.envs.returned_steps import ReturnedSteps
from textgym.envs.sb3 import TextGenVecEnv, deferrable
from textgym.language_model import LanguageModel
from textgym.prompts.rows import PromptSource
from textgym.replies import Reply
from textgym.rewards import RewardError
from textgym.sampling import SamplingSettings

TextEnv = str | gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv


class TextEnvironment:
    """The text environment at the bottom of a ``VecEnv``, as an agent sees it, whatever is wrapped around it.

    A rollout is :meth:`begin_rollout`, :meth:`step` as often as wanted, and :meth:`scores`: what the steps earned,
    whenever that is computed and whoever changed it on its way.

    :param vec_env: around one :class:`TextGenVectorEnv`, or around N single environments
    """

    def __init__(self, vec_env: VecEnv) -> None:
        self.vec_env = vec_env
        bottom = vec_env.unwrapped
        self.rows: TextGenVectorEnv | None = bottom.text_env if isinstance(bottom, TextGenVecEnv) else None
        # Where nobody stands between, the environment itself keeps the record; else what came back is recorded.
        self._bare = deferrable(vec_env)
        self._returned = ReturnedSteps(vec_env.num_envs)

    def _get(self, name: str) -> Any:
        if self.rows is not None:
            return getattr(self.rows, name)
        return self.vec_env.get_attr(name, indices=[0])[0]

    @property
    def temperature(self) -> float:
        return float(self._get("temperature"))

    @property
    def sampling(self) -> SamplingSettings:
        """How an agent samples here."""
        settings: SamplingSettings = self._get("sampling")
        return settings

    @property
    def reply(self) -> Reply | None:
        """Who speaks after each turn; None where nobody does, or where they are in another process."""
        if self.rows is None and not isinstance(self.vec_env.unwrapped, DummyVecEnv):
            return None
        found: Reply | None = self._get("reply")
        return found

    @property
    def prompts(self) -> PromptSource:
        """What prompts are drawn from."""
        source: PromptSource = self._get("prompts")
        return source

    @property
    def masking(self) -> bool:
        return bool(self._get("masking"))

    @property
    def kl_coef(self) -> float:
        return float(self._get("kl_coef"))

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        if self.rows is not None:
            self.rows.kl_coef = value
        else:  # set_attr would set it on the outermost wrapper of each
            self.vec_env.env_method("set_wrapper_attr", "kl_coef", value)

    def action_masks(self) -> np.ndarray:
        """``(N, V)`` bool, the tokens that the current states allow."""
        if self.rows is not None:
            return self.rows.action_masks()
        return np.stack(self.vec_env.env_method("action_masks"))

    def forget_cached(self) -> None:
        """Drop what the environment's models have cached."""
        if self.rows is not None:
            self.rows.forget_cached()
        else:
            self.vec_env.env_method("forget_cached")

    @property
    def episode_numbers(self) -> np.ndarray | None:
        """``(N,)`` numbers of the rows' episodes in a round, -1 where a row waits; None without a round."""
        return self.rows.episode_numbers if self.rows is not None and self.rows.in_round else None

    @property
    def max_actions(self) -> int:
        """Most tokens that a policy writes in an episode."""
        return int(self._get("max_actions"))

    def check_rounds(self) -> TextGenVectorEnv:
        """:raises ValueError: unless the rows are those of one vector environment without wrappers."""
        bare = deferrable(self.vec_env)
        if bare is None:
            raise ValueError(
                f"env={self.vec_env} has no rounds of whole episodes, which this agent learns from: its rows are "
                "environments of their own, or something is wrapped around them that counts steps by itself. Make it "
                "with gym.make_vec('TextGen-v0', num_envs=...), or pass the id"
            )
        return bare

    def begin_round(self, episodes: int, group_size: int) -> dict[str, np.ndarray]:
        """Begin a round of whole episodes, see :meth:`TextGenVectorEnv.begin_round`."""
        return self.check_rounds().begin_round(episodes, group_size)

    # Rollouts

    def begin_rollout(self, scoring: str, fresh: np.ndarray) -> None:
        """Record the steps from now on. Those that a failed reward has left unscored stay in the record.

        :param scoring: ``"instant"``, ``"deferred"`` or ``"auto"``: see
            :class:`~textgym.agents.common.on_policy.TextOnPolicyAlgorithm`
        :param fresh: ``(N,)`` bool, rows whose episode begins with the next step
        """
        if self._bare is not None:
            self._bare.begin_rollout(defer_scoring=scoring != "instant")
        else:
            self._returned.begin(fresh)

    @property
    def steps_waiting(self) -> int:
        """Steps that were taken and not scored."""
        return 0 if self._bare is None else self._bare.steps_waiting

    def step(self, actions: np.ndarray, log_probs: np.ndarray) -> VecEnvStepReturn:
        """Take a step of every row.

        :param actions: ``(N,)`` tokens
        :param log_probs: ``(N,)`` under which they were drawn, in nats
        :return: what a ``VecEnv`` returns; rewards are zero where they are computed later
        """
        log_probs = np.minimum(log_probs, 0.0)  # a sure token may come out at +1e-7
        if self.rows is not None:
            self.rows.report_log_probs(log_probs)
        else:
            for row, log_prob in enumerate(log_probs.tolist()):
                self.vec_env.env_method("report_log_prob", log_prob, indices=[row])
        returned = self.vec_env.step(actions)
        if self._bare is None:
            self._returned.add(returned)
        return returned

    def scores(self, log_probs: np.ndarray | None = None) -> RolloutScores:
        """What the steps since the last call earned, and the episodes that ended in them.

        :param log_probs: ``(K, N)`` of the last K steps' actions, in nats, where they are known better by now; what
            something wrapped around the environment has seen of rewards stays as it was
        :raises RewardError: if the reward fails; the steps stay, and can be asked for again
        """
        return self._returned.scores() if self._bare is None else self._bare.scores(log_probs)

    def end_rollout(self) -> None:
        """Stop recording. Steps that wait are scored, if the reward allows, and forgotten."""
        if self._bare is not None:
            with contextlib.suppress(RuntimeError, RewardError):
                if self._bare.steps_waiting:
                    self._bare.scores()
                self._bare.end_rollout()

    def policy_language_model(self, device: torch.device) -> LanguageModel:
        """A trainable copy of the environment's language model."""
        if self.rows is not None:
            return self.rows.policy_language_model(device)
        model: LanguageModel = self.vec_env.env_method("policy_language_model", device, indices=[0])[0]
        return model

    def reference_language_model(self) -> LanguageModel:
        """What the KL is measured against, and whose likeliest tokens may be sampled; a copy from another process."""
        if self.rows is not None:
            return self.rows.reference_language_model()
        model: LanguageModel = self.vec_env.env_method("reference_language_model", indices=[0])[0]
        return model

    def shared_language_model(self, device: torch.device) -> LanguageModel:
        """The environment's language model itself, for an adapter beside its weights; a copy from another process."""
        if self.rows is not None or isinstance(self.vec_env.unwrapped, DummyVecEnv):
            return self.reference_language_model()
        return self.policy_language_model(device)
