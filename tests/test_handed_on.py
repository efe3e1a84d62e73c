"""Constructor arguments that rewards and replies hand on: stated once, listed by every signature, and no others."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest
from typing_extensions import get_type_hints

from textgym.handed_on import constructor_parameters, takers
from textgym.json_client import JsonClient
from textgym.replies import RemoteReply
from textgym.rewards import (
    ClassifierReward,
    Fluency,
    LikelihoodCoherence,
    LogProbReward,
    ProcessReward,
    RemoteReward,
    SentenceEncoder,
    SentenceFluency,
    TargetLikelihood,
)
from textgym.rewards.models.likelihood import TextLikelihood
from textgym.rewards.models.text_forward import TextForward

TAKERS = {
    RemoteReward: JsonClient,
    RemoteReply: JsonClient,
    ClassifierReward: TextForward,
    ProcessReward: TextForward,
    SentenceEncoder: TextForward,
    LogProbReward: TextLikelihood,
    Fluency: TextLikelihood,
    SentenceFluency: TextLikelihood,
    TargetLikelihood: TextLikelihood,
    LikelihoodCoherence: TextLikelihood,
}


@pytest.mark.parametrize(("cls", "taker"), TAKERS.items())
def test_an_argument_that_is_handed_on_has_the_type_and_the_default_of_the_class_that_takes_it(cls, taker):
    init = inspect.unwrap(cls.__init__)
    handed_on = get_type_hints(get_args(get_type_hints(init)["arguments"])[0])
    listed = inspect.signature(cls).parameters
    assert "arguments" not in listed
    for name, kind in handed_on.items():
        takes = next(c for c in takers(cls) if c is not cls and name in constructor_parameters(c))
        stated = next(c for c in takers(takes) if name in inspect.signature(inspect.unwrap(c.__init__)).parameters)
        assert get_type_hints(inspect.unwrap(stated.__init__))[name] == kind, name
        assert listed[name].default == inspect.signature(takes).parameters[name].default, name
        assert listed[name].kind is inspect.Parameter.KEYWORD_ONLY, name
    assert taker in takers(cls)
    assert handed_on.keys() <= listed.keys()


def test_what_is_handed_on_arrives():
    remote = RemoteReward("http://localhost:1", timeout=3.0, headers={"a": "b"})
    assert (remote._client.timeout, remote._client.headers) == (3.0, {"a": "b"})
    assert RemoteReply("http://localhost:1", retries=0)._client.retries == 0


def test_what_a_class_does_not_take_is_named_beside_what_it_takes():
    with pytest.raises(TypeError, match=r"RemoteReward got .* 'timout'; did you mean 'timeout'\? It takes url, "):
        RemoteReward("http://localhost:1", timout=3.0)
    with pytest.raises(TypeError, match="SentenceFluency got an unexpected keyword argument 'append_eos'"):
        SentenceFluency("embedded", append_eos=True)
    with pytest.raises(TypeError, match="ProcessReward got an unexpected keyword argument 'truncation_side'"):
        ProcessReward(None, None, truncation_side="right")


def test_a_class_of_ones_own_takes_what_it_states():
    class Mine(RemoteReward):
        def __init__(self, port: int) -> None:
            super().__init__(f"http://localhost:{port}", concurrency=2)

    assert list(inspect.signature(Mine).parameters) == ["port"]
    assert Mine(1)._client.concurrency == 2
