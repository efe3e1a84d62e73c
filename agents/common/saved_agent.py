"""An agent that is kept and opened again: Stable-Baselines3's format, a folder without code, and its state between two
rollouts."""

from __future__ import annotations

import io
import pathlib
import warnings
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from textgym.agents.buffers.episode_buffer import EpisodeBuffer
from textgym.agents.common.pretrained import (
    arguments_of,
    load_value_head,
    pickled_names,
    read_agent,
    sampling_of,
    stored_spaces,
    write_agent,
)
from textgym.agents.common.text_environment import TextEnv
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.envs.sb3 import as_vec_env
from textgym.language_model import load_language_model

if TYPE_CHECKING:
    from typing_extensions import Self

# Plain numbers that change while an agent learns.
_COUNTERS = (
    "num_timesteps",
    "_total_timesteps",
    "_num_timesteps_at_start",
    "_episode_num",
    "_n_updates",
    "_current_progress_remaining",
)


class TrustWarning(UserWarning):
    """A file is opened that can run code."""


class SavedAgent(OnPolicyAlgorithm):
    """Loading and saving of an agent with a language-model policy, and what it needs to go on between two rollouts;
    :mod:`textgym.agents.common.pretrained` has the files."""

    policy: LanguageModelPolicy
    rollout_buffer: EpisodeBuffer
    _last_obs: Any
    _pending_log: dict[str, Any]  # of a resumed run: what the last update before the stop recorded

    @classmethod
    def load(
        cls,
        path: str | pathlib.Path | io.BufferedIOBase,
        env: TextEnv | None = None,
        device: torch.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        trust: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load what ``save`` wrote. The file holds pickles: opening it runs whatever code they name.

        An agent from somebody else is opened by :meth:`from_pretrained`, which reads data only.

        :param path: the zip file
        :param env: to go on learning in
        :param device: where the networks go
        :param custom_objects: attributes to use instead of the stored ones; those aren't unpickled
        :param print_system_info: whether to print on what system the agent was saved
        :param force_reset: whether to begin new episodes before learning on
        :param trust: whether you trust who made the file. True: load. False: refuse a file with pickles. None: load,
            with a warning that names what is unpickled
        :param kwargs: attributes to change
        :raises ValueError: with ``trust=False``, if loading would run code
        """
        if trust is not True:
            names = [name for name in pickled_names(path) if name not in (custom_objects or {})]
            message = (
                f"{path} holds pickles ({', '.join(names)}), and opening a pickle runs the code that it names. "
                "Load files only from people you trust; from_pretrained opens what save_pretrained wrote, without that"
            )
            if names and trust is False:
                raise ValueError(message)
            if names:
                warnings.warn(f"{message}. trust=True says that you do", TrustWarning, stacklevel=2)
        vec_env = None if env is None else as_vec_env(env)
        return super().load(path, vec_env, device, custom_objects, print_system_info, force_reset, **kwargs)

    def save_pretrained(self, directory: str | pathlib.Path) -> None:
        """Write the agent as files without code: a Hugging Face checkpoint, the value head and the configuration.

        ``AutoModelForCausalLM``, ``AutoTokenizer`` and textgym's ``language_model=`` open the directory as the trained
        language model, :meth:`from_pretrained` as the agent. To go on with a training exactly, with the state of the
        optimizer and of every episode, see :mod:`textgym.agents.callbacks.checkpoints`.

        An adapter is merged into the weights that are written, and stands by itself in ``adapter`` besides.

        :param directory: made if it does not exist
        :raises NotADirectoryError: if it is a file
        """
        directory = pathlib.Path(directory)
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(f"directory={str(directory)!r} is a file; a checkpoint is a directory")
        self.policy.language_model.save_pretrained(directory)
        write_agent(self, directory)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | pathlib.Path,
        env: TextEnv | None = None,
        *,
        device: torch.device | str = "auto",
        **arguments: Any,
    ) -> Self:
        """Open an agent that :meth:`save_pretrained` wrote; no code in the directory is run.

        The optimizer begins anew. Of an agent with an adapter the merged weights are opened, and all of them learn;
        pass ``policy_kwargs={"lora": ...}`` for a new adapter beside them.

        :param directory: what was written
        :param env: to learn in; without one the agent predicts and generates
        :param device: where the networks go
        :param arguments: constructor arguments to use instead of the stored ones
        :raises FileNotFoundError: if the directory holds no agent
        :raises ValueError: if it holds another one, or one of its arguments was a function and isn't given
        """
        directory = pathlib.Path(directory)
        configuration = read_agent(directory, cls.__name__)
        language_model = load_language_model(str(directory), device=device, dtype=configuration["dtype"])
        policy_kwargs = {
            **configuration["policy"],
            "sampling": sampling_of(configuration),
            **arguments.pop("policy_kwargs", {}),
            "language_model": language_model.trainable_copy(),
        }
        model = cls(
            "LanguageModelPolicy",
            None if env is None else as_vec_env(env),  # type: ignore[arg-type]
            policy_kwargs=policy_kwargs,
            device=device,
            _init_setup_model=env is not None,
            **arguments_of(cls, configuration, arguments),
        )
        if env is None:
            model.observation_space, model.action_space = stored_spaces(configuration)
            model.n_envs = 1
            model._setup_model()
        load_value_head(model, directory)
        model.num_timesteps = configuration["num_timesteps"]
        return model

    # Between two rollouts

    @property
    def has_begun(self) -> bool:
        """Whether there was a first observation, so that there is a state to keep."""
        return self._last_obs is not None

    def state_dict(self) -> dict[str, Any]:
        """What the agent itself has to keep between two rollouts for training to go on exactly, as tensors and plain
        data. Weights that don't learn, such as those beside an adapter, are not among it.

        Where the environment stands, random states and callbacks belong to a checkpoint, too:
        :mod:`textgym.agents.callbacks.checkpoints`.
        """
        frozen = self._frozen()
        return {
            "agent": type(self).__name__,
            "policy": {name: tensor for name, tensor in self.policy.state_dict().items() if name not in frozen},
            "optimizer": self.policy.optimizer.state_dict(),
            "counters": {name: getattr(self, name) for name in _COUNTERS if hasattr(self, name)},
            "finished_episodes": [dict(episode) for episode in self.ep_info_buffer or []],
            "last_episode_starts": np.asarray(self._last_episode_starts),
            "held": self.rollout_buffer.state_dict(),
            "extra": self.extra_state(),
            # What the last update recorded is written with the next rollout's figures.
            "log": dict(self.logger.name_to_value),
        }

    def load_state_dict(self, state: dict[str, Any], observation: Any) -> None:
        """Go on from what :meth:`state_dict` gave.

        :param state: of an agent made like this one
        :param observation: the environment's, where it stands by now
        :raises ValueError: if the policy has other weights
        """
        wrong = set(state["policy"]) ^ (set(self.policy.state_dict()) - self._frozen())
        if wrong:
            raise ValueError(f"the state's policy has other weights than this one; they differ in {sorted(wrong)[:3]}")
        self.policy.load_state_dict(state["policy"], strict=False)
        self.policy.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.ep_info_buffer = deque(state["finished_episodes"], maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        self._last_obs = observation
        self._last_episode_starts = np.asarray(state["last_episode_starts"])
        self.rollout_buffer.load_state_dict(state.get("held", {}))
        self.load_extra_state(state["extra"])
        self._pending_log = state["log"]

    def _frozen(self) -> set[str]:
        """Weights that don't learn, such as those beside an adapter: they are where the model was opened from."""
        parameters = self.policy.named_parameters(remove_duplicate=False)
        return {name for name, parameter in parameters if not parameter.requires_grad}

    def extra_state(self) -> dict[str, Any]:
        """What an exact checkpoint needs besides policy, optimizer and environment, as tensors and plain data."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`extra_state` gave."""
