"""PPO with whole_episodes: an episode is learned from after the rollout in which it ends, once, and as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_agents import logs_of_learning, tiny_ppo, tiny_vector_env, values_of
from tiny_models import tiny_causal_reward_model, tiny_tokenizer

from textgym.agents import PPO
from textgym.agents.common.exploration import Exploration
from textgym.envs.segments import Segment
from textgym.rewards.models.causal import CausalRewardModel

STEPS = 12  # of a rollout; episodes have up to 8 tokens
PER_STEP = ("rewards", "values", "log_probs", "advantages", "returns", "kl", "episode_starts", "importance")

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "instant": {"scoring": "instant"},
    "masked": {"env": {"action_masking": True, "top_k": 12, "min_new_tokens": 2}},
    "discounted": {"gamma": 0.9, "bootstrap_truncated": True},
}


def agent(n_steps: int = STEPS, env: dict[str, Any] | None = None, **arguments: Any) -> PPO:
    options = {"reward": CausalRewardModel(tiny_causal_reward_model(), tiny_tokenizer()), **(env or {})}
    return tiny_ppo(tiny_vector_env(**options), n_steps=n_steps, **{"whole_episodes": True, **arguments})


class Rollouts:
    """An agent's rollouts, without updates between them unless asked for."""

    def __init__(self, model: PPO) -> None:
        self.model = model
        self.callback = model._setup_learn(10**6)[1]

    def collect(self, update: bool = False) -> list[tuple[Segment, dict[str, np.ndarray]]]:
        """One rollout: its segments, each with what the buffer has of its steps."""
        model, buffer = self.model, self.model.rollout_buffer
        if update:
            model.train()
        assert model.collect_rollouts(model.env, self.callback, buffer, model.n_steps)
        found = []
        for segment in buffer.segments:
            at = (slice(segment.start, segment.start + segment.steps), segment.row)
            arrays = {name: getattr(buffer, name) for name in (*PER_STEP, "packed_masks")}
            steps = {name: array[at].copy() for name, array in arrays.items() if array is not None}
            found.append((segment, {**steps, "actions": buffer.actions[at][:, 0].copy()}))
        return found


def by_row(segments: list[tuple[Segment, Any]]) -> list[tuple[Segment, Any]]:
    return sorted(segments, key=lambda pair: (pair[0].row, pair[0].start))


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_rollouts_have_the_episodes_of_one_three_times_as_long(setting):
    """Without updates between them, what is learned from must not depend on where rollouts end."""
    short = Rollouts(agent(**SETTINGS[setting]))
    rows: dict[int, list[Any]] = {}
    for _ in range(3):
        for segment, steps in by_row(short.collect()):
            rows.setdefault(segment.row, []).append((segment, steps))
    pieces = [pair for row in sorted(rows) for pair in rows[row]]
    long = Rollouts(agent(3 * STEPS, **SETTINGS[setting]))  # seeds anew
    wholes = by_row(long.collect())
    assert len(pieces) == len(wholes) > 15
    assert short.model.num_timesteps == long.model.num_timesteps == 3 * STEPS * 4
    for (ours, found), (theirs, expected) in zip(pieces, wholes, strict=True):
        np.testing.assert_array_equal(ours.prefix, theirs.prefix)
        assert ours.prompt_length == theirs.prompt_length == len(ours.prefix)
        np.testing.assert_array_equal(found["actions"], expected["actions"])
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=2e-5, err_msg=name)


def test_what_is_learned_from_are_the_episodes_that_ended_and_nothing_else():
    rollouts = Rollouts(agent(learning_rate=1e-3))
    for number in range(5):
        segments = rollouts.collect(update=number > 0)
        finished = rollouts.model.finished_episodes
        assert sorted((s.row, s.steps) for s, _ in segments) == sorted((e["row"], e["l"]) for e in finished)
        returns = sorted(float(steps["rewards"].sum()) for _, steps in segments)
        np.testing.assert_allclose(returns, sorted(e["r"] for e in finished), atol=1e-5)
        minibatches = list(rollouts.model.rollout_buffer.get(16))
        assert sum(len(batch.actions) for batch in minibatches) == sum(e["l"] for e in finished)


def test_generalised_advantages_reach_back_over_the_whole_episode():
    rollouts = Rollouts(agent(gamma=0.9, gae_lambda=0.8, learning_rate=1e-2))
    longer = 0
    for number in range(3):
        for segment, steps in rollouts.collect(update=number > 0):
            held = rollouts.model.rollout_buffer.held_steps
            longer += segment.start < held
            advantage, following = 0.0, 0.0
            for step in reversed(range(segment.steps)):
                error = steps["rewards"][step] + 0.9 * following - steps["values"][step]
                advantage = error + 0.9 * 0.8 * advantage
                following = steps["values"][step]
                assert steps["advantages"][step] == pytest.approx(advantage, abs=1e-5)
                assert steps["returns"][step] == pytest.approx(advantage + following, abs=1e-5)
    assert longer >= 4  # episodes that began in an earlier rollout


def test_tokens_of_earlier_rollouts_keep_the_probabilities_that_they_were_drawn_with():
    model = agent(learning_rate=1e-2)
    rollouts = Rollouts(model)
    rollouts.collect()
    buffer = model.rollout_buffer
    drawn, values = buffer.log_probs[-buffer.rollout_steps :].copy(), buffer.values[-buffer.rollout_steps :].copy()
    rollouts.collect(update=True)
    held = buffer.held_steps
    assert 0 < held < 8
    earlier = buffer.active[:held]
    assert earlier.any()
    np.testing.assert_array_equal(buffer.log_probs[:held][earlier], drawn[-held:][earlier])
    np.testing.assert_array_equal(buffer.values[:held][earlier], values[-held:][earlier])
    batch = buffer.samples(buffer.segments)
    _, now, _ = model.policy.evaluate_segments(batch)
    ratio = (now - batch.old_log_prob).exp().detach().numpy()
    old = buffer.places(buffer.segments)[0] < held
    assert np.abs(ratio[~old] - 1).max() < 1e-4
    assert np.abs(ratio[old] - 1).max() > 1e-2  # an update lies between


def test_no_text_is_read_for_its_second_part():
    read_for_a_token = {}
    for whole in (False, True):
        rollouts = Rollouts(agent(whole_episodes=whole))
        segments = [segment for _ in range(6) for segment, _ in rollouts.collect()]
        read_for_a_token[whole] = sum(s.length for s in segments) / sum(s.steps for s in segments)
        assert all(len(s.prefix) == s.prompt_length for s in segments) == whole
    assert read_for_a_token[True] < 0.9 * read_for_a_token[False]


def test_exploration_that_ends_between_the_parts_of_an_episode_still_counts():
    model = agent(learning_rate=0.0)
    rollouts = Rollouts(model)
    model.exploration = Exploration(temperature=2.0)
    rollouts.collect()
    model.exploration = None
    rollouts.collect()
    buffer = model.rollout_buffer
    assert buffer.importance is not None
    earlier, held = buffer.active.copy(), buffer.held_steps
    earlier[held:] = False
    assert np.abs(buffer.importance[earlier] - 1).max() > 1e-2
    new = buffer.active.copy()
    new[:held] = False
    np.testing.assert_allclose(buffer.importance[new], 1.0, atol=1e-6)


def test_episodes_that_a_reset_ends_are_given_up():
    model = agent()
    model.learn(STEPS * 4)
    assert model.rollout_buffer.state_dict()
    model.learn(STEPS * 4)  # begins anew
    segments = model.rollout_buffer.segments
    assert all(segment.start >= model.rollout_buffer.held_steps for segment in segments)
    assert sorted(s.steps for s in segments) == sorted(e["l"] for e in model.finished_episodes)


def test_tokens_that_a_copy_drew_count_by_the_ratio_to_the_weights_of_the_update():
    model = agent(policy_kwargs={"rollout_dtype": "bfloat16"}, learning_rate=3e-3, importance_cap=1.05)
    rollouts = Rollouts(model)
    rollouts.collect()
    buffer = model.rollout_buffer
    drawn = buffer.state_dict()["drawn_with"]
    rollouts.collect(update=True)
    held, earlier = buffer.held_steps, buffer.active.copy()
    earlier[held:] = False
    assert earlier.any()
    segments = buffer.segments
    _, now, _ = model.policy.evaluate_segments(buffer.samples(segments))
    log_probs = np.zeros_like(buffer.log_probs)
    log_probs[buffer.places(segments)] = now.detach().numpy()
    expected = np.minimum(np.exp(log_probs[:held] - drawn), 1.05)[earlier[:held]]
    np.testing.assert_allclose(buffer.importance[earlier], expected, rtol=1e-3)
    assert expected.min() < 0.99
    np.testing.assert_allclose(buffer.log_probs[buffer.active], log_probs[buffer.active], atol=1e-5)


def test_rollouts_that_could_end_no_episode_are_refused():
    with pytest.raises(ValueError, match=r"n_steps=6 is less than the 8 tokens of the longest episode.*whole_episodes"):
        agent(6)
    model = agent(8)
    with pytest.raises(ValueError, match=r"n_steps=8 is less than the 9 tokens"):
        model.set_env(tiny_vector_env(max_new_tokens=9))


def test_it_learns():
    env = tiny_vector_env(16, kl_coef=0.0, action_masking=True)
    model = tiny_ppo(env, n_steps=16, batch_size=128, n_epochs=4, learning_rate=1e-2, whole_episodes=True)
    scores = values_of(logs_of_learning(model, 2_400, until=("rollout/score_mean", 0.9)), "rollout/score_mean")
    assert scores[0] < 0.4
    assert scores[-1] > scores[0] + 0.4
