"""Exploring: tokens are drawn from another distribution, and everything else stays that of the policy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import LinearSchedule
from tiny_agents import logs_of_learning, tiny_ppo, tiny_vector_env, values_of

from textgym.agents import GRPO, PPO, Exploration
from textgym.agents.common.exploration import Mixture


def explored(options: dict[str, float], agent: type = PPO, env_options: dict | None = None, **arguments) -> PPO:
    """An agent with a rollout that it explored in, whose weights aren't the reference model's any more."""
    env = tiny_vector_env(8, **(env_options or {}))
    arguments["exploration"] = Exploration(**options)
    make = tiny_ppo if agent is PPO else functools.partial(agent, "LanguageModelPolicy", seed=0, device="cpu")
    model = make(env=env, **arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    callback = model._setup_learn(1000)[1]
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    return model


@pytest.mark.parametrize("agent", [PPO, GRPO])
@pytest.mark.parametrize(
    ("options", "temperature", "share"),
    [({"temperature": 1.7}, 1.7, 0.0), ({"reference_share": 0.3}, 1.0, 0.3),
     ({"temperature": 0.8, "reference_share": 0.5}, 0.8, 0.5)],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_stored_log_probs_are_the_policys_and_weights_correct_for_it(agent, options, temperature, share, masked):
    """Against plain forwards of the two transformers over each prefix."""
    env_options = {"temperature": 0.9, "kl_coef": 0.1, "action_masking": masked}
    model = explored(options, agent, env_options)
    reference = model.env.text_env.reference_language_model().model
    buffer = model.rollout_buffer
    for segment in buffer.segments[:6]:
        ids = list(segment.prefix)
        for step in range(segment.start, segment.start + segment.steps):
            action = int(buffer.actions[step, segment.row, 0])
            both = []
            for network in (model.policy.transformer, reference):
                with torch.no_grad():
                    logits = network(torch.tensor([ids])).logits[0, -1] / 0.9
                if masked:
                    allowed = np.unpackbits(buffer.packed_masks[step, segment.row], count=len(logits)).astype(bool)
                    logits[torch.as_tensor(~allowed)] = -torch.inf
                both.append(logits.softmax(-1))
            policy, other = both
            flat = policy ** (1 / temperature)
            drawn = (1 - share) * flat / flat.sum() + share * other
            assert buffer.log_probs[step, segment.row] == pytest.approx(float(policy[action].log()), abs=1e-4)
            weight = min(float(policy[action] / drawn[action]), 2.0)
            assert buffer.importance[step, segment.row] == pytest.approx(weight, rel=1e-3)
            ids.append(action)


def test_tokens_come_from_the_mixture():
    """With nearly all tokens from the reference, their mean log-probability is the reference's."""
    model = explored({"reference_share": 0.999}, n_steps=100, env_options={"kl_coef": 0.0})
    expected = explored({"reference_share": 0.0}, n_steps=100, env_options={"kl_coef": 0.0})

    def under_reference(agent: PPO) -> float:
        reference = agent.env.text_env.reference_language_model()
        batch = next(agent.rollout_buffer.get())
        hidden = reference.cached(agent.policy.context).hidden_at(
            batch.input_ids, batch.lengths, batch.rows, batch.positions
        )
        with torch.no_grad():
            chosen, entropy = reference.token_log_probs(hidden, batch.actions, 1.0)
        return float((chosen + entropy).mean())  # 0 in the mean for the model's own tokens

    assert abs(under_reference(model)) < 0.15
    assert under_reference(expected) < -0.2


def test_without_exploring_nothing_is_weighed():
    model = tiny_ppo().learn(48)
    assert model.rollout_buffer.importance is None
    model = tiny_ppo(exploration=Exploration(temperature=1.5)).learn(48)
    assert model.rollout_buffer.importance is not None


def test_schedules_follow_the_progress_and_the_first_ratio_stays_one():
    exploration = Exploration(LinearSchedule(2.0, 1.0, 1.0), 0.2)
    logs = logs_of_learning(tiny_ppo(tiny_vector_env(8), n_steps=8, batch_size=32, exploration=exploration), 320)
    temperatures = values_of(logs, "rollout/exploration_temperature")
    assert temperatures[0] == pytest.approx(2.0, abs=1e-6)
    assert np.all(np.diff(temperatures) < 0)
    assert set(values_of(logs, "rollout/exploration_reference_share")) == {0.2}
    assert max(values_of(logs, "train/ratio_first")) < 1e-4


def test_an_exploring_agent_learns():
    exploration = Exploration(LinearSchedule(1.5, 1.0, 1.0), 0.1)
    arguments = {"n_steps": 16, "batch_size": 128, "n_epochs": 4, "learning_rate": 1e-2, "exploration": exploration}
    model = tiny_ppo(tiny_vector_env(16, kl_coef=0.05), **arguments)
    scores = values_of(logs_of_learning(model, 16 * 16 * 10, until=("rollout/score_mean", 0.6)), "rollout/score_mean")
    assert scores[0] < 0.25
    assert scores[-1] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"reference_share": 1.0}, "reference_share=1.0 must be below 1"),
        ({"reference_share": -0.1}, "reference_share=-0.1"),
        ({"temperature": LinearSchedule(1.0, 0.0, 1.0)}, "temperature=0.0"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Exploration(**options)


def test_log_probs_of_a_mixture_by_hand():
    policy = torch.tensor([[0.5, 0.5, 0.0]]).log()
    reference = torch.tensor([[0.0, 0.2, 0.8]]).log()
    mixture = Mixture(reference_share=0.25).log_probs(policy, reference).exp()
    torch.testing.assert_close(mixture, torch.tensor([[0.375, 0.425, 0.2]]))
    assert torch.equal(Mixture().log_probs(policy, None), policy)


def test_something_else_than_an_exploration_is_named():
    with pytest.raises(TypeError, match=r"exploration=1\.5 must be an Exploration, such as Exploration\(temperature"):
        tiny_ppo(exploration=1.5)


def test_an_exploring_agent_is_saved_and_opened_with_its_schedules(tmp_path):
    exploration = Exploration(LinearSchedule(2.0, 1.0, 0.5), 0.2)
    model = tiny_ppo(exploration=exploration).learn(16)
    model.save(tmp_path / "agent.zip")
    model.save_pretrained(tmp_path / "agent")
    for opened in (
        PPO.load(tmp_path / "agent.zip", device="cpu", trust=True),
        PPO.from_pretrained(tmp_path / "agent", tiny_vector_env(2), device="cpu"),
    ):
        for progress in (1.0, 0.7, 0.0):
            assert opened.exploration.at(progress) == exploration.at(progress)


def test_a_temperature_that_is_code_is_not_stored(tmp_path):
    tiny_ppo(exploration=Exploration(lambda progress: 1 + progress)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pass exploration= to from_pretrained"):
        PPO.from_pretrained(tmp_path, device="cpu")
    opened = PPO.from_pretrained(tmp_path, device="cpu", exploration=Exploration(temperature=1.5))
    assert opened.exploration.at(1.0) == Mixture(1.5)
