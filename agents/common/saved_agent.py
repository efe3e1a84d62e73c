"""An agent that is written to files and opened again: Stable-Baselines3's format, and a folder without code."""

from __future__ import annotations

import io
import pathlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

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


class TrustWarning(UserWarning):
    """A file is opened that can run code."""


class SavedAgent(OnPolicyAlgorithm):
    """Loading and saving of an agent with a language-model policy; :mod:`textgym.agents.common.pretrained` has the
    files."""

    policy: LanguageModelPolicy

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
