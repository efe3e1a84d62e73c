"""The agents that a run can train, by the names that the command line has for them."""

from __future__ import annotations

import difflib
from typing import Any

from textgym.agents.a2c import A2C
from textgym.agents.dpo import DPO
from textgym.agents.expert_iteration import ExpertIteration
from textgym.agents.grpo import GRPO
from textgym.agents.nlpo import NLPO
from textgym.agents.on_policy import TextOnPolicyAlgorithm
from textgym.agents.ppo import PPO
from textgym.agents.pretrained import constructor_parameters
from textgym.agents.q_learning import QLearning
from textgym.agents.reinforce import REINFORCE
from textgym.agents.rloo import RLOO
from textgym.agents.runs.config import ALGORITHM, RunConfig, sections
from textgym.agents.sarsa import SARSA
from textgym.agents.soft_q_learning import SoftQLearning
from textgym.agents.trpo import TRPO

AGENTS: dict[str, type[TextOnPolicyAlgorithm]] = {
    "ppo": PPO,
    "a2c": A2C,
    "reinforce": REINFORCE,
    "rloo": RLOO,
    "grpo": GRPO,
    "nlpo": NLPO,
    "trpo": TRPO,
    "softq": SoftQLearning,
    "q": QLearning,
    "sarsa": SARSA,
    "expert": ExpertIteration,
    "dpo": DPO,
}
# The options whose values have other names on the command line.
_NORMALIZE: dict[str, bool | str] = {"minibatch": True, "rollout": "rollout", "none": False}
KL_PER_TOKEN = 0.2  # nats that a pretrained model may be from its reference, where no kl_target is given
_GENERAL = ("lr_schedule",)  # of every agent, by way of the learning rate


def agent_class(algorithm: str) -> type[TextOnPolicyAlgorithm]:
    """:raises ValueError: if there is no such agent"""
    if algorithm not in AGENTS:
        close = difflib.get_close_matches(algorithm, AGENTS)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"algorithm={algorithm!r} must be one of {', '.join(AGENTS)}{hint}")
    return AGENTS[algorithm]


def options_of(algorithm: str) -> dict[str, Any]:
    """The agent's options among those of a run, with its own defaults."""
    parameters = constructor_parameters(agent_class(algorithm))
    names = [field.name for field in sections()[ALGORITHM] if field.name in parameters]
    defaults = {name: parameters[name].default for name in names}
    if "normalize_advantage" in defaults:
        defaults["normalize_advantage"] = {value: name for name, value in _NORMALIZE.items()}[
            defaults["normalize_advantage"]
        ]
    return defaults


def resolved(algorithm: str, config: RunConfig) -> RunConfig:
    """The configuration with the agent's own defaults in the place of what was left open.

    :raises ValueError: if an option was given that the agent does not have
    """
    own = options_of(algorithm)
    if "n_steps" in own:
        own["n_steps"] = config.max_new_tokens  # a rollout of whole episodes, more or less
    values = config.as_dict()
    for field in sections()[ALGORITHM]:
        if field.name in _GENERAL:
            continue
        if field.name in own:
            if values[field.name] is None:
                values[field.name] = own[field.name]
        elif values[field.name] is not None:
            raise ValueError(
                f"{field.name}={values[field.name]!r} is no option of {algorithm}; its own are {', '.join(own)}"
            )
    if config.stats_window_size is None:
        # Training's figures stand beside held-out ones of the same weights: older episodes are of older weights.
        whole = (values["n_steps"] or config.max_new_tokens) // config.max_new_tokens
        values["stats_window_size"] = values["episodes"] or config.rows * max(1, whole)
    return RunConfig(**_with_kl_target(values))


def _with_kl_target(values: dict[str, Any]) -> dict[str, Any]:
    """With a target of the KL where none is given: a pretrained model is worth staying near.

    A fixed β keeps a policy as near as the reward is small; one that rises above a target does whatever the reward.
    """
    found = dict(values)
    if found["kl_target"] is None:
        found["kl_target"] = 0.0
        if found["model"] != "embedded" and found["kl_coef"] > 0:
            found["kl_target"] = round(KL_PER_TOKEN * found["max_new_tokens"], 6)
            completions = found["timesteps"] / found["max_new_tokens"]
            # By a factor of 1.2 in a rollout of whole episodes, or more slowly in a long run.
            horizon = max(completions / 20, float(found["rows"]))
            defaults = {"kl_coef_min": found["kl_coef"], "kl_horizon": horizon}
            found.update({name: value for name, value in defaults.items() if found[name] is None})
    defaults = {"kl_coef_min": 0.0, "kl_horizon": 10_000.0}
    found.update({name: value for name, value in defaults.items() if found[name] is None})
    return found


def arguments_of(algorithm: str, config: RunConfig) -> dict[str, Any]:
    """The agent's constructor arguments that a configuration, :func:`resolved`, has among its options."""
    arguments = {name: getattr(config, name) for name in options_of(algorithm)}
    if "normalize_advantage" in arguments:
        arguments["normalize_advantage"] = _NORMALIZE[arguments["normalize_advantage"]]
    return arguments
