"""Constructor arguments: each is stated once, signatures list them all, and no other is taken."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest
from tiny_agents import tiny_ppo, tiny_vector_env
from typing_extensions import get_type_hints

import textgym.agents
from textgym.agents import A2C, GRPO, NLPO, PPO, SARSA, TextEpisodeAlgorithm, TextOnPolicyAlgorithm
from textgym.agents.names import AGENTS
from textgym.handed_on import constructor_parameters

CLASSES = [getattr(textgym.agents, name) for name in AGENTS.values()]


@pytest.mark.parametrize("agent", CLASSES)
def test_an_argument_that_is_handed_on_has_the_type_that_the_base_class_gives_it(agent):
    rest = inspect.signature(agent.__init__).parameters.get("arguments")
    if rest is None:
        assert agent in (A2C, PPO)  # the lists of Stable-Baselines3
        return
    handed_on = get_type_hints(get_args(get_type_hints(agent.__init__)["arguments"])[0])
    base = agent.__mro__[1]
    for name, kind in handed_on.items():
        takes = next(c for c in agent.__mro__[1:] if name in inspect.signature(c.__init__).parameters)
        assert get_type_hints(takes.__init__)[name] == kind, name
        assert name in constructor_parameters(base), name


@pytest.mark.parametrize("agent", CLASSES)
def test_a_signature_lists_what_is_handed_on_with_its_default(agent):
    parameters = inspect.signature(agent).parameters
    assert list(parameters)[:2] == ["policy", "env"]
    assert parameters["stats_window_size"].default == 100
    assert "arguments" not in parameters
    for name, parameter in parameters.items():
        if name not in ("policy", "env"):
            assert parameter.default is not parameter.empty, name


def test_what_an_agent_does_not_take_is_named_beside_what_it_takes():
    vec = tiny_vector_env(4)
    with pytest.raises(
        TypeError, match=r"SARSA got an unexpected .* 'n_epochs'; it takes policy, env, q_temperature, "
    ):
        SARSA("LanguageModelPolicy", vec, n_epochs=3)
    with pytest.raises(
        TypeError, match=r"GRPO got an unexpected .* 'groupsize'; did you mean 'group_size'\? It takes "
    ):
        GRPO("LanguageModelPolicy", vec, groupsize=3)
    with pytest.raises(TypeError, match="PPO got an unexpected keyword argument 'group_size'"):
        tiny_ppo(vec, group_size=3)
    with pytest.raises(TypeError, match="positional"):
        GRPO("LanguageModelPolicy", vec, 1e-4)


def test_an_agent_of_ones_own_takes_what_it_hands_on_without_saying_what():
    class Plain(TextEpisodeAlgorithm):
        def __init__(self, policy, env, strength=1.0, **arguments):
            self.strength = strength
            super().__init__(policy, env, vf_coef=0.5, **arguments)

    assert set(constructor_parameters(Plain)) == {"strength", *constructor_parameters(TextEpisodeAlgorithm)}
    assert Plain("LanguageModelPolicy", tiny_vector_env(4), gamma=0.9, strength=2.0).gamma == 0.9
    with pytest.raises(TypeError, match="Plain got an unexpected keyword argument 'n_steps'"):
        Plain("LanguageModelPolicy", tiny_vector_env(4), n_steps=3)


def test_defaults_are_those_of_the_nearest_class():
    assert constructor_parameters(NLPO)["n_epochs"].default == constructor_parameters(PPO)["n_epochs"].default == 4
    assert constructor_parameters(TextOnPolicyAlgorithm)["n_epochs"].default == 1


def test_a_class_without_a_constructor_has_its_base_classs_signature():
    class Same(PPO):
        pass

    assert inspect.signature(Same) == inspect.signature(PPO)
