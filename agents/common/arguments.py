"""Constructor arguments of agents: which there are, by what an agent learns from.

What an argument means, and its default, stands at the base class that has it
(:class:`~textgym.agents.common.on_policy.TextOnPolicyAlgorithm`,
:class:`~textgym.agents.common.whole_episodes.TextEpisodeAlgorithm`,
:class:`~textgym.agents.common.off_policy.TextOffPolicyAlgorithm`). An agent names its own, and says with
``**arguments: Unpack[...]`` which others it hands on; no other is taken. Its signature lists them all.
"""

from __future__ import annotations

import difflib
import inspect
from types import SimpleNamespace
from typing import Any, get_args

import torch
from stable_baselines3.common.type_aliases import Schedule
from typing_extensions import TypedDict, get_type_hints

from textgym.agents.common.exploration import Exploration


class SharedArguments(TypedDict, total=False):
    """What every agent takes besides ``policy`` and ``env``."""

    learning_rate: float | Schedule
    max_grad_norm: float
    scoring: str
    stats_window_size: int
    tensorboard_log: str | None
    policy_kwargs: dict[str, Any] | None
    verbose: int
    seed: int | None
    device: torch.device | str
    _init_setup_model: bool


class PolicyGradientArguments(TypedDict, total=False):
    """What agents take that raise and lower the probabilities of their own tokens."""

    gamma: float
    ent_coef: float
    whiten_rewards: bool
    exploration: Exploration | None
    importance_cap: float | None


class RatioArguments(TypedDict, total=False):
    """What agents take whose loss has ratios of new to old probabilities, so that a rollout serves several steps."""

    batch_size: int | None
    n_epochs: int
    target_kl: float | None


class LearningArguments(SharedArguments, PolicyGradientArguments, RatioArguments, total=False):
    """Of clipped policy gradients, whatever a rollout is."""


class RoundArguments(SharedArguments, total=False):
    """What every agent takes that learns from rounds of whole episodes."""

    episodes: int | None


class RoundGradientArguments(RoundArguments, PolicyGradientArguments, total=False):
    """Of policy gradients from whole episodes."""


class GroupArguments(LearningArguments, total=False):
    """Of clipped policy gradients from whole episodes, in groups that are compared."""

    episodes: int | None


class ReplayArguments(RoundArguments, total=False):
    """What every agent takes that learns from a replay of episodes."""

    replay_episodes: int
    batch_episodes: int | None
    gradient_steps: int
    gamma: float
    tau: float
    target_update_interval: int


def constructor_parameters(agent: type[Any]) -> dict[str, inspect.Parameter]:
    """The arguments that an agent's constructor takes by name, those that it hands on as ``**arguments`` included.

    With ``**arguments: Unpack[...]`` these are the keys of a ``TypedDict``; without, all that the base class takes.
    """
    parameters: dict[str, inspect.Parameter] = {}
    handed_on: set[str] | None = None  # None for all
    for cls in agent.__mro__:
        init = vars(cls).get("__init__")
        if init is None:
            continue
        own = list(inspect.signature(init).parameters.values())[1:]  # without self
        rest, by_name_alone = None, bool(parameters)  # what is handed on is
        for parameter in own:
            if parameter.kind is parameter.VAR_KEYWORD:
                rest = parameter
            elif parameter.name not in parameters and (handed_on is None or parameter.name in handed_on):
                kind = parameter.KEYWORD_ONLY if by_name_alone else parameter.kind
                parameters[parameter.name] = parameter.replace(kind=kind)
        if rest is None:
            break
        keys = _keys(init, rest)
        if keys is not None:
            handed_on = keys if handed_on is None else handed_on & keys
    return parameters


def _keys(init: Any, rest: inspect.Parameter) -> set[str] | None:
    """The keys of the ``TypedDict`` that ``**rest`` is annotated with; None where it isn't."""
    if "Unpack" not in str(rest.annotation):
        return None
    hints = get_type_hints(SimpleNamespace(__annotations__={"rest": rest.annotation}), init.__globals__)
    return set(get_type_hints(get_args(hints["rest"])[0]))


def check_arguments(agent: type[Any], given: dict[str, Any]) -> None:
    """:raises TypeError: if a constructor is given by name what it doesn't take"""
    known = constructor_parameters(agent)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known)
            public = [other for other in known if not other.startswith("_")]
            hint = f"did you mean {close[0]!r}? It" if close else "it"
            raise TypeError(
                f"{agent.__name__} got an unexpected keyword argument {name!r}; {hint} takes {', '.join(public)}"
            )
