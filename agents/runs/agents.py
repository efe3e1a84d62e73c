"""The agents that a run can train, by the names that the command line has for them."""

from __future__ import annotations

import difflib
import inspect
import sys
from pathlib import Path
from typing import Any

import textgym.agents
from textgym.agents import names
from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.runs.config import ALGORITHM, RunConfig, sections
from textgym.checks import shown
from textgym.handed_on import constructor_parameters
from textgym.named_objects import object_named
from textgym.rewards.code_names import names_code

AGENTS: dict[str, type[TextOnPolicyAlgorithm]] = {
    name: getattr(textgym.agents, agent) for name, agent in names.AGENTS.items()
}
# The options whose values have other names on the command line.
_NORMALIZE: dict[str, bool | str] = {"minibatch": True, "rollout": "rollout", "none": False}
KL_PER_TOKEN = 0.2  # nats that a pretrained model may be from its reference, where no kl_target is given
_GENERAL = ("lr_schedule",)  # of every agent, by way of the learning rate
# Constructor arguments that the run gives.
_OF_THE_RUN = {"policy", "env", "policy_kwargs", "seed", "device", "tensorboard_log", "verbose", "_init_setup_model"}


def agent_class(algorithm: str | type[TextOnPolicyAlgorithm]) -> type[TextOnPolicyAlgorithm]:
    """The agent of a name, or the class itself.

    :param algorithm: one of ``AGENTS``, ``file.py:Class`` or ``module:Class``, whose code is run, or a class
    :raises TypeError: if it is neither a name nor a class of an agent
    :raises ValueError: if there is no such agent
    """
    found: Any = algorithm
    if isinstance(algorithm, str):
        if algorithm in AGENTS:
            return AGENTS[algorithm]
        if not names_code(algorithm):
            close = difflib.get_close_matches(algorithm, AGENTS)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"algorithm={algorithm!r} must be one of {', '.join(AGENTS)}, or a class of your own as file.py:Class "
                f"or module:Class{hint}"
            )
        where, _, name = algorithm.rpartition(":")
        found = object_named(where, name, f"algorithm={algorithm!r}")
    if not isinstance(found, type) or not issubclass(found, TextOnPolicyAlgorithm):
        raise TypeError(
            f"algorithm={shown(algorithm)} must be the name of an agent or a class that derives from "
            "TextOnPolicyAlgorithm"
        )
    return found


def agent_name(algorithm: str | type[TextOnPolicyAlgorithm]) -> str:
    """Under which name a run's configuration keeps its agent, so that it is found again from any folder.

    A class of one's own is kept as ``/path/file.py:Class``, or ``module:Class`` where it comes from no file.
    """
    if isinstance(algorithm, str):
        where, _, name = algorithm.rpartition(":")
        return f"{Path(where).expanduser().resolve()}:{name}" if where.endswith(".py") else algorithm
    for name, agent in AGENTS.items():
        if agent is algorithm:
            return name
    file = getattr(sys.modules.get(algorithm.__module__), "__file__", None)
    where = algorithm.__module__ if file is None or not file.endswith(".py") else str(Path(file).resolve())
    return f"{where}:{algorithm.__qualname__}"


def options_of(algorithm: str | type[TextOnPolicyAlgorithm]) -> dict[str, Any]:
    """The agent's options among those of a run, with its own defaults."""
    parameters = constructor_parameters(agent_class(algorithm))
    names = [field.name for field in sections()[ALGORITHM] if field.name in parameters]
    defaults = {name: _default(parameters[name]) for name in names}
    if "normalize_advantage" in defaults:
        defaults["normalize_advantage"] = {value: name for name, value in _NORMALIZE.items()}[
            defaults["normalize_advantage"]
        ]
    return defaults


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default is parameter.empty else parameter.default


def _check_own_options(algorithm: str | type[TextOnPolicyAlgorithm], config: RunConfig) -> None:
    """:raises ValueError: if ``agent_options`` has what the constructor doesn't take, or what has an option already"""
    taken = {field.name for field in sections()[ALGORITHM]} | _OF_THE_RUN
    known = [name for name in constructor_parameters(agent_class(algorithm)) if name not in taken]
    for name in config.agent_arguments():
        if name in taken:
            raise ValueError(f"agent_options has {name!r}, which is an option of the run: set it there")
        if name not in known:
            close = difflib.get_close_matches(name, known)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known) or 'none'}"
            raise ValueError(f"agent_options has {name!r}, which {agent_name(algorithm)} doesn't take; {hint}")


def resolved(algorithm: str | type[TextOnPolicyAlgorithm], config: RunConfig) -> RunConfig:
    """The configuration with the agent's own defaults in the place of what was left open.

    :raises ValueError: if an option was given that the agent does not have
    """
    _check_own_options(algorithm, config)
    own = options_of(algorithm)
    if "n_steps" in own:
        own["n_steps"] = config.longest_episode  # a rollout of whole episodes, more or less
    values = config.as_dict()
    for field in sections()[ALGORITHM]:
        if field.name in _GENERAL:
            continue
        if field.name in own:
            if values[field.name] is None:
                values[field.name] = own[field.name]
        elif values[field.name] is not None:
            raise ValueError(
                f"{field.name}={values[field.name]!r} is not an option of {agent_name(algorithm)}; its own are "
                f"{', '.join(own)}"
            )
    if config.stats_window_size is None:
        # Training's figures stand beside held-out ones of the same weights: older episodes are of older weights.
        whole = (values["n_steps"] or config.longest_episode) // config.longest_episode
        values["stats_window_size"] = values["episodes"] or config.rows * max(1, whole)
    return RunConfig(**_with_kl_target(values))


def _with_kl_target(values: dict[str, Any]) -> dict[str, Any]:
    """With a target of the KL where none is given: a pretrained model is worth staying near.

    A fixed β keeps a policy as near as the reward is small; one that rises above a target does whatever the reward.
    """
    found, longest = dict(values), RunConfig(**values).longest_episode
    if found["kl_target"] is None:
        found["kl_target"] = 0.0
        if found["model"] != "embedded" and found["kl_coef"] > 0:
            found["kl_target"] = round(KL_PER_TOKEN * longest, 6)
            completions = found["timesteps"] / longest
            # By a factor of 1.2 in a rollout of whole episodes, or more slowly in a long run.
            horizon = max(completions / 20, float(found["rows"]))
            defaults = {"kl_coef_min": found["kl_coef"], "kl_horizon": horizon}
            found.update({name: value for name, value in defaults.items() if found[name] is None})
    defaults = {"kl_coef_min": 0.0, "kl_horizon": 10_000.0}
    found.update({name: value for name, value in defaults.items() if found[name] is None})
    return found


def arguments_of(algorithm: str | type[TextOnPolicyAlgorithm], config: RunConfig) -> dict[str, Any]:
    """The agent's constructor arguments that a configuration, :func:`resolved`, has among its options."""
    arguments = {name: getattr(config, name) for name in options_of(algorithm)}
    if "normalize_advantage" in arguments:
        arguments["normalize_advantage"] = _NORMALIZE[arguments["normalize_advantage"]]
    return {**arguments, **config.agent_arguments()}
