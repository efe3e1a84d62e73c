"""The predicted difference to a target: learned from triples, used where the prompt row names the target."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny_agents import tiny_vector_env
from tiny_models import tiny_causal_reward_model, tiny_tokenizer

from textgym.reward_training import train_reward
from textgym.rewards import FunctionReward, PredictedDifference, RewardError, as_reward, difference_rows

WORDS = "film movie story plot cast actor scene music".split()


def missing(completion: str, target: str) -> float:
    """The share of the target's words that the completion does not have."""
    words = target.split()
    return sum(word not in completion.split() for word in words) / len(words)


def triples(number: int, seed: int) -> list[tuple[str, str, float]]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        target, completion = (" ".join(rng.choice(WORDS, 2, replace=False)) for _ in range(2))
        if rng.random() < 0.4:
            completion = " ".join(rng.permutation(target.split()))
        made.append((completion, target, missing(completion, target)))
    return made


@pytest.mark.slow
def test_a_model_learns_to_predict_a_difference_and_rewards_with_it(tmp_path):
    train_reward(
        difference_rows(triples(900, 0)),
        tmp_path / "model",
        model=tiny_causal_reward_model(),
        tokenizer=tiny_tokenizer(),
        epochs=30,
        learning_rate=3e-3,
        batch_size=64,
        patience=30,
        device="cpu",
    )
    reward = PredictedDifference(as_reward(tmp_path / "model"))
    unseen = triples(200, 1)
    scores = reward(
        prompts=["say it"] * 200,
        completions=[completion for completion, _, _ in unseen],
        target=[target for _, target, _ in unseen],
    )
    assert spearmanr(scores, [-difference for _, _, difference in unseen]).statistic > 0.7


def length_difference(prompts, completions):
    return [-abs(len(p.split()) - len(c.split())) for p, c in zip(prompts, completions, strict=True)]


def test_it_is_an_instant_reward_of_the_environment():
    prompts = [{"prompt": "the film is", "target": "good good good"}]
    reward = PredictedDifference(FunctionReward(length_difference))
    env = tiny_vector_env(2, prompts=prompts, reward=reward, kl_coef=0.0, max_new_tokens=6)
    env.reset(seed=0)
    word = env.vocabulary.tokenizer.convert_tokens_to_ids("fine")
    paid = [env.step(np.array([word, word]))[1][0] for _ in range(5)]
    np.testing.assert_allclose(paid, [1, 1, 1, -1, -1])  # from −3 up to 0, and down again


def test_other_columns_reach_the_model_and_rows_without_a_target_have_no_score():
    seen = {}

    def model(prompts, completions, weight):
        seen.update(prompts=prompts, completions=completions, weight=weight)
        return [1.0] * len(prompts)

    reward = PredictedDifference(as_reward(model), "answer")
    scores = reward(prompts=["p"] * 3, completions=["a", "b", "c"], answer=["x", None, "z"], weight=[1, 2, 3])
    assert scores == [1.0, None, 1.0]
    assert seen == {"prompts": ["x\n", "z\n"], "completions": ["a", "c"], "weight": [1, 3]}
    assert PredictedDifference(model)(prompts=[], completions=[], target=[], weight=[]) == []


def test_missing_and_wrong_targets_are_named():
    reward = PredictedDifference(FunctionReward(length_difference))
    with pytest.raises(RewardError, match="needs 'target', which the prompts have no column for"):
        reward(prompts=["p"], completions=["c"])
    with pytest.raises(RewardError, match="column 'target' holds 3; expected a text"):
        reward(prompts=["p"], completions=["c"], target=[3])
