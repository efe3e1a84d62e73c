"""Policy, reference and reward model can be on devices of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_agents import tiny_language_model, tiny_vector_env
from tiny_models import tiny_causal_reward_model, tiny_tokenizer

from textgym.agents import PPO
from textgym.language_model import LanguageModel
from textgym.rewards import CausalRewardModel


def test_a_policy_goes_to_its_own_device_and_the_reference_stays() -> None:
    envs = tiny_vector_env(2)
    policy = envs.policy_language_model(torch.device("meta"))
    assert policy.device.type == "meta"
    assert envs.reference_language_model().device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("where", [("cpu", "cpu"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_rewards_do_not_depend_on_where_reference_and_reward_model_are(where: tuple[str, str]) -> None:
    def trained(reference: str, reward: str) -> PPO:
        given = tiny_language_model()
        lm = LanguageModel(given.model.to(reference), given.tokenizer)
        scored = CausalRewardModel(tiny_causal_reward_model().to(reward), tiny_tokenizer())
        envs = tiny_vector_env(4, language_model=lm, reward=scored)
        model = PPO("LanguageModelPolicy", envs, n_steps=12, batch_size=16, seed=0, device="cuda")
        model.learn(48)
        assert lm.device.type == reference
        assert scored.model.device.type == reward
        assert model.policy.device.type == "cuda"
        return model

    together, apart = trained("cuda", "cuda"), trained(*where)
    # Of the first rollout, whose texts are the same: nothing has been learned yet.
    np.testing.assert_array_equal(together.rollout_buffer.actions, apart.rollout_buffer.actions)
    np.testing.assert_allclose(together.rollout_buffer.rewards, apart.rollout_buffer.rewards, atol=1e-3)
    assert apart.logger.name_to_value["train/ratio_first"] < 1e-3
