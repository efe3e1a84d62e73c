"""An agent in a text environment: its policy starts from the environment's language model, and samples as it does."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv
from transformers import PreTrainedModel

from textgym.agents.common.saved_agent import SavedAgent
from textgym.agents.common.text_environment import TextEnv, TextEnvironment
from textgym.agents.distributed.processes import Processes
from textgym.agents.policy.blueprint import LanguageModelBlueprint
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.agents.policy.observations import check_spaces
from textgym.envs.sb3 import as_vec_env, deferrable
from textgym.language_model import LanguageModel, load_language_model
from textgym.lora import wants_lora


class TextAgent(SavedAgent):
    """What an agent has before it takes a step: environment, policy, and the processes that learn together.

    - ``processes``: those that learn together (:mod:`textgym.agents.distributed`), in most cases one alone
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"LanguageModelPolicy": LanguageModelPolicy}

    processes: Processes
    whole_episodes: bool
    scoring: str
    _environment: TextEnvironment  # below what the agent was given as env

    @staticmethod
    def make_vec_env(env: TextEnv | None) -> VecEnv | None:
        """The ``VecEnv`` of an id, a Gymnasium environment or vector environment, or a ``VecEnv``."""
        return None if env is None else as_vec_env(env)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return OnPolicyAlgorithm._wrap_env(as_vec_env(env), verbose, monitor_wrapper)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """The last rollout may have more tokens than are left: SB3's share of what remains, and with it a learning rate
        in proportion to it, would then be below 0, and the update would unlearn.
        """
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def _setup_model(self) -> None:
        if not issubclass(self.policy_class, LanguageModelPolicy):
            raise ValueError(f"policy={self.policy_class.__name__} must be a LanguageModelPolicy")
        self.processes = Processes.join(cpu=self.device.type == "cpu")
        kwargs = dict(self.policy_kwargs)
        if self.env is not None:
            environment = self._environment = self._checked_environment(self.env)
            kwargs.setdefault("temperature", environment.temperature)
            kwargs["sampling"] = environment.sampling
            if wants_lora(kwargs.get("lora")):
                self._share_language_model(environment, kwargs)
            elif "language_model" not in kwargs:
                kwargs["language_model"] = environment.policy_language_model(self.device)
            elif isinstance(kwargs["language_model"], LanguageModel | PreTrainedModel):
                # Most likely the object that the environment was made with, too: its reference must not learn.
                given = load_language_model(kwargs["language_model"], tokenizer=kwargs.pop("tokenizer", None))
                kwargs["language_model"] = given.with_model(copy.deepcopy(given.model))
        elif "language_model" not in kwargs:
            raise ValueError("env=None: give an environment, whose language model the policy starts from")
        self.policy_kwargs = kwargs
        self._pending_log = {}
        super()._setup_model()
        if self.env is not None:
            self._sample_as(environment)
        self.processes.take(self.policy)
        # What is saved with the agent: no path of this machine, no weights a second time.
        kwargs = {name: value for name, value in kwargs.items() if name != "tokenizer"}
        self.policy_kwargs = {**kwargs, "language_model": self.policy.blueprint()}
        if "lora" in kwargs:
            self.policy_kwargs["lora"] = self.policy.lora  # plain data

    def _share_language_model(self, environment: TextEnvironment, kwargs: dict[str, Any]) -> None:
        """With an adapter nobody's weights change, so the policy gets the environment's model and no copy of it."""
        given = kwargs.get("language_model")
        if given is None:
            kwargs["language_model"] = environment.shared_language_model(self.device)
        elif isinstance(given, LanguageModelBlueprint):
            # A loaded agent: while it is rebuilt its weights are still to come, and most likely they are these.
            shared = environment.shared_language_model(self.device)
            if dataclasses.replace(LanguageModelBlueprint.of(shared), name=given.name) == given:
                kwargs["language_model"] = shared

    def set_random_seed(self, seed: int | None = None) -> None:
        """Seed everything random; in several processes each gets a seed of its own.

        :param seed: the same in every process
        """
        super().set_random_seed(self.processes.seed(seed))

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """Go on in another environment, with as many rows and the same spaces.

        :param env: whatever the constructor takes
        :param force_reset: whether to begin new episodes
        """
        vec_env = as_vec_env(env)
        environment = self._checked_environment(vec_env)
        super().set_env(vec_env, force_reset)
        self._environment = environment
        self._sample_as(environment)
        self.policy_kwargs = {**self.policy_kwargs, "sampling": environment.sampling}

    def _sample_as(self, environment: TextEnvironment) -> None:
        """Let the policy generate texts as the agent learns them."""
        self.policy.sampling, self.policy.reply = environment.sampling, environment.reply
        self.policy.reference = environment.reference_language_model() if environment.sampling.restricted else None

    def _checked_environment(self, env: VecEnv) -> TextEnvironment:
        check_spaces(env.observation_space, env.action_space)
        environment = TextEnvironment(env)
        if self.whole_episodes and self.n_steps < environment.max_actions:
            raise ValueError(
                f"n_steps={self.n_steps} is less than the {environment.max_actions} tokens of the longest "
                "episode in the environment (max_new_tokens, times max_turns where somebody replies): "
                "with whole_episodes=True a rollout could end no episode, and have nothing to learn from"
            )
        temperature = self.policy_kwargs.get("temperature", environment.temperature)
        if temperature != environment.temperature:
            raise ValueError(
                f"the policy's temperature={temperature} is not the environment's {environment.temperature}: "
                "the KL to the reference would compare different distributions; set it in the environment"
            )
        if self.scoring == "deferred" and deferrable(env) is None:
            raise ValueError(
                "scoring='deferred' needs the bare text vector environment: a wrapper, or an environment "
                "made of single ones, looks at every reward and would see zeros; use 'auto' or 'instant'"
            )
        return environment

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        action_masks: np.ndarray | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """See :meth:`LanguageModelPolicy.predict`."""
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_pending_log", "processes", "_environment"]
