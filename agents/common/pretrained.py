"""An agent as a folder without code: the language model as Hugging Face writes it, the value head, and a JSON file.

``save`` and ``load`` are Stable-Baselines3's and keep pickles; a pickle can run anything when it is opened. What is
written here holds data only, so an agent from somebody else can be opened without trusting them.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from gymnasium import spaces
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from textgym.agents.common.exploration import Exploration
from textgym.handed_on import constructor_parameters
from textgym.sampling import SamplingSettings

if TYPE_CHECKING:
    from textgym.agents.common.saved_agent import SavedAgent

AGENT, VALUE_HEAD = "agent.json", "value_head.safetensors"
FORMAT = 1
_KINDS = {
    "arguments": dict,
    "policy": dict,
    "sampling": dict,
    "dtype": str,
    "context": int,
    "vocab_size": int,
    "num_timesteps": int,
}  # of what is in the configuration
# Constructor arguments that belong to a place or a session rather than to the agent.
_LEFT_OUT = {"policy", "env", "policy_kwargs", "tensorboard_log", "verbose", "device", "_init_setup_model"}
_POLICY = ("temperature", "value_head", "value_trunk")


def write_agent(model: SavedAgent, folder: Path) -> None:
    """Write the value head and the agent's configuration beside its language model."""
    value_head = model.policy.value_net.state_dict()
    tensors = {name: value.cpu().contiguous() for name, value in value_head.items()}
    safetensors.torch.save_file(tensors, folder / VALUE_HEAD)
    names = [name for name in constructor_parameters(type(model)) if name not in _LEFT_OUT]
    agent = {
        "format": FORMAT,
        "agent": type(model).__name__,
        "arguments": {name: _as_json(_argument(model, name)) for name in names},
        "policy": {name: getattr(model.policy, name) for name in _POLICY},
        "sampling": model.policy.sampling.as_dict(),
        "dtype": str(model.policy.language_model.model.dtype).removeprefix("torch."),
        "context": model.policy.context,
        "vocab_size": int(model.action_space.n),  # type: ignore[attr-defined]
        "num_timesteps": model.num_timesteps,
    }
    (folder / AGENT).write_text(json.dumps(agent, indent=2) + "\n", encoding="utf-8")


def read_agent(folder: Path, agent: str) -> dict[str, Any]:
    """Read the configuration.

    :param folder: what ``save_pretrained`` wrote
    :param agent: name of the class that is to be opened
    :raises FileNotFoundError: if there is none
    :raises ValueError: if it is broken, of another class or of another version
    """
    path = folder / AGENT
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {AGENT}: it is not what an agent's save_pretrained wrote")
    try:
        configuration: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(configuration, dict):
        raise ValueError(f"{path} is broken: it is a {type(configuration).__name__}, not an object")
    if configuration.get("format") != FORMAT:
        raise ValueError(f"{path} has format {configuration.get('format')!r}; this version of textgym reads {FORMAT}")
    name = configuration.get("agent")
    if name != agent:
        raise ValueError(f"{path} is of the agent {name}, not {agent}: open it with {name}.from_pretrained")
    for key, kind in _KINDS.items():
        if not isinstance(configuration.get(key), kind) or isinstance(configuration[key], bool):
            raise ValueError(f"{path} is broken: {key} is {configuration.get(key)!r}, not a {kind.__name__}")
    for key in configuration["policy"]:
        if key not in _POLICY:
            raise ValueError(f"{path} has the policy's {key}, which no agent is saved with: it is not to be trusted")
    return configuration


def arguments_of(agent: type[Any], configuration: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments from a configuration and what the caller gives instead.

    Somebody else may have written the configuration, so it names the agent's own hyperparameters and nothing that is
    the user's to say, such as where files go.

    :raises ValueError: if the configuration names another argument, or one that was a function, which the file does not
        hold, and none is given
    """
    known = constructor_parameters(agent).keys() - _LEFT_OUT
    for name in configuration["arguments"]:
        if name not in known:
            raise ValueError(
                f"{AGENT} has the argument {name}, which {agent.__name__} is not saved with: the file is not what "
                "save_pretrained wrote, and not to be trusted"
            )
    arguments = {}
    for name, value in {**configuration["arguments"], **overrides}.items():
        if name not in overrides:
            value = _from_json(name, value)
        arguments[name] = value
    return arguments


def sampling_of(configuration: dict[str, Any]) -> SamplingSettings:
    """How the agent samples.

    :raises ValueError: if the configuration doesn't say it in a way that is possible
    """
    return SamplingSettings.from_dict(configuration["sampling"])


def read_sampling(folder: Path) -> SamplingSettings:
    """How the agent that was saved in a folder samples, whatever its class.

    :raises ValueError: if the configuration is broken or doesn't say it
    """
    try:
        return sampling_of(json.loads((folder / AGENT).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / AGENT} is broken: {error}") from error


def load_value_head(model: SavedAgent, folder: Path) -> None:
    """Put the stored value head into the policy.

    :raises ValueError: if it is missing, broken, or of another shape
    """
    path = folder / VALUE_HEAD
    try:
        model.policy.value_net.load_state_dict(safetensors.torch.load_file(path))
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} is not a value head that fits this agent: {error}") from error


def stored_spaces(configuration: dict[str, Any]) -> tuple[spaces.Dict, spaces.Discrete]:
    """The spaces of the environment that the agent was trained in."""
    context, vocab_size = configuration["context"], configuration["vocab_size"]
    observation: dict[str, spaces.Space[Any]] = {
        "input_ids": spaces.Box(0, vocab_size - 1, (context,), np.int64),
        "attention_mask": spaces.Box(0, 1, (context,), np.int8),
        "prompt_length": spaces.Box(0, context, (1,), np.int64),
    }
    return spaces.Dict(observation), spaces.Discrete(vocab_size)


def _argument(model: SavedAgent, name: str) -> Any:
    # SB3 keeps stats_window_size under a private name.
    return getattr(model, name if hasattr(model, name) else f"_{name}")


def _as_json(value: Any) -> Any:
    while isinstance(value, FloatSchedule):
        value = value.value_schedule
    if isinstance(value, ConstantSchedule):
        return value.val
    if isinstance(value, LinearSchedule):
        return {"linear": [value.start, value.end, value.end_fraction]}
    if isinstance(value, Exploration):
        return {"exploration": {field: _as_json(part) for field, part in vars(value).items()}}
    if callable(value):
        return {"function": getattr(value, "__name__", repr(value))}
    return value.item() if isinstance(value, np.generic | torch.Tensor) else value


def _from_json(name: str, value: Any) -> Any:
    """:raises ValueError: if an argument is code, which is not stored, or is not what :func:`_as_json` gives"""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"linear"}:
        return LinearSchedule(*value["linear"])
    if value.keys() == {"exploration"}:
        return Exploration(**{field: _from_json(name, part) for field, part in value["exploration"].items()})
    raise ValueError(
        f"{name} was the function {value.get('function')}, which is code and not stored: "
        f"pass {name}= to from_pretrained"
    )


def pickled_names(path: str | Path | io.BufferedIOBase) -> list[str]:
    """What an SB3 zip stores as pickles: loading the file runs the code in them.

    :param path: the file that ``save`` wrote, with or without its ending, or an open file
    """
    if isinstance(path, str | Path) and not Path(path).exists():
        path = f"{path}.zip"
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    if isinstance(path, io.BufferedIOBase):
        path.seek(0)
    return sorted(name for name, value in data.items() if isinstance(value, dict) and ":serialized:" in value)
