"""The episode buffer loses no transition, rebuilds every observation, and computes SB3's advantages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer

from textgym.agents import EpisodeBuffer

CONTEXT, VOCAB, STEPS, ROWS = 12, 20, 9, 5
OBSERVATIONS = spaces.Dict(
    {
        "input_ids": spaces.Box(0, VOCAB - 1, (CONTEXT,), np.int64),
        "attention_mask": spaces.Box(0, 1, (CONTEXT,), np.int8),
        "prompt_length": spaces.Box(0, CONTEXT, (1,), np.int64),
    }
)


def filled(
    masks: bool = False, seed: int = 0, bounds: tuple[int, int] = (2, 7)
) -> tuple[EpisodeBuffer, DictRolloutBuffer, list[np.ndarray]]:
    """A random rollout of episodes of random lengths, in our buffer and in SB3's, and its action masks."""
    rng = np.random.default_rng(seed)
    arguments: dict[str, Any] = {"device": "cpu", "gae_lambda": 0.9, "gamma": 0.97, "n_envs": ROWS}
    ours = EpisodeBuffer(STEPS, OBSERVATIONS, spaces.Discrete(VOCAB), **arguments)
    stock = DictRolloutBuffer(STEPS, OBSERVATIONS, spaces.Discrete(VOCAB), **arguments)
    texts = [rng.integers(1, VOCAB, size=rng.integers(1, 5)).tolist() for _ in range(ROWS)]
    ends = [len(text) + rng.integers(*bounds) for text in texts]
    # Rows 0 and 1 are in the middle of an episode: the rollout before was cut there.
    starts = np.array([row > 1 for row in range(ROWS)])
    kept_masks = []
    for _ in range(STEPS):
        obs = {
            "input_ids": np.array([text + [0] * (CONTEXT - len(text)) for text in texts]),
            "attention_mask": np.array([[1] * len(t) + [0] * (CONTEXT - len(t)) for t in texts], dtype=np.int8),
            "prompt_length": np.zeros((ROWS, 1), dtype=np.int64),
        }
        actions = rng.integers(0, VOCAB, size=ROWS)
        step = (
            obs,
            actions,
            rng.normal(size=ROWS),
            starts,
            torch.tensor(rng.normal(size=(ROWS, 1))),
            torch.tensor(rng.normal(size=ROWS)),
        )
        kept_masks.append(rng.random((ROWS, VOCAB)) < 0.5)
        ours.add(*step, action_masks=kept_masks[-1] if masks else None)
        stock.add(*step)
        starts = np.zeros(ROWS, dtype=bool)
        for row in range(ROWS):
            texts[row] = [*texts[row], int(actions[row])]
            if len(texts[row]) >= ends[row]:
                texts[row] = rng.integers(1, VOCAB, size=rng.integers(1, 5)).tolist()
                ends[row] = len(texts[row]) + rng.integers(*bounds)
                starts[row] = True
    last = torch.tensor(rng.normal(size=(ROWS, 1)), dtype=torch.float32)
    for buffer in (ours, stock):
        buffer.compute_returns_and_advantage(last, starts)
    return ours, stock, kept_masks


@pytest.mark.parametrize("seed", range(3))
def test_every_transition_is_in_one_segment_and_the_observations_can_be_rebuilt(seed):
    ours, stock, _ = filled(seed=seed)
    taken = np.zeros((STEPS, ROWS), dtype=int)
    for segment in ours.segments:
        taken[segment.start : segment.start + segment.steps, segment.row] += 1
    assert (taken == 1).all()
    assert len(ours.segments) == ROWS + int(ours.episode_starts[1:].sum())
    single = ours.as_single_steps()
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(single.observations[name], stock.observations[name])
    for name in ("actions", "rewards", "values", "log_probs", "episode_starts"):
        np.testing.assert_array_equal(getattr(single, name), getattr(stock, name))


def test_advantages_and_returns_are_those_of_stable_baselines3():
    ours, stock, _ = filled()
    np.testing.assert_array_equal(ours.advantages, stock.advantages)
    np.testing.assert_array_equal(ours.returns, stock.returns)
    assert ours.advantages.std() > 0


def test_an_observation_that_is_not_the_last_one_plus_the_action_begins_a_segment():
    buffer = EpisodeBuffer(4, OBSERVATIONS, spaces.Discrete(VOCAB), device="cpu", n_envs=1)
    for step, text in enumerate([[3, 4], [3, 4, 5], [7], [7, 5]]):  # at the third, somebody changed the text
        obs = {
            "input_ids": np.array([text + [0] * (CONTEXT - len(text))]),
            "attention_mask": np.array([[1] * len(text) + [0] * (CONTEXT - len(text))]),
        }
        buffer.add(obs, np.array([5]), np.zeros(1), np.array([step == 0]), torch.zeros(1), torch.zeros(1))
    assert [(s.start, s.steps, s.prefix.tolist()) for s in buffer.segments] == [(0, 2, [3, 4]), (2, 2, [7])]


@pytest.mark.parametrize("batch_size", [None, 1, 4, 10, 13, 22, 45, 1000])
def test_minibatches_hold_every_transition_once_and_are_even(batch_size):
    ours, _, _ = filled()
    total = STEPS * ROWS
    ours.rewards[:] = 0
    ours.advantages = np.arange(total, dtype=np.float32).reshape(STEPS, ROWS)  # names each transition
    batches = list(ours.get(batch_size))
    seen = np.concatenate([batch.advantages.numpy() for batch in batches])
    assert sorted(seen.tolist()) == list(range(total))
    wished = 1 if batch_size is None else max(1, round(total / batch_size))
    assert len(batches) == min(wished, len(ours.segments))
    longest = max(segment.steps for segment in ours.segments)
    if wished <= total / longest:
        assert all(abs(len(batch.actions) - total / wished) <= longest for batch in batches)


def test_minibatches_are_shuffled_by_the_numpy_seed():
    ours, _, _ = filled()

    def order(seed: int) -> list[float]:
        np.random.seed(seed)  # noqa: NPY002 (what SB3's set_random_seed seeds)
        return np.concatenate([batch.returns.numpy() for batch in ours.get(10)]).tolist()

    assert order(0) == order(0) != order(1)


def test_samples_point_at_the_state_each_action_was_chosen_in():
    ours, stock, kept_masks = filled(masks=True)
    by_advantage = {float(ours.advantages[at]): at for at in np.ndindex(STEPS, ROWS)}
    assert len(by_advantage) == STEPS * ROWS
    for batch in ours.get(12):
        for i, advantage in enumerate(batch.advantages.tolist()):
            at = by_advantage[advantage]
            length = int(stock.observations["attention_mask"][at].sum())
            assert batch.positions[i] == length - 1
            np.testing.assert_array_equal(
                batch.input_ids[batch.rows[i], :length], stock.observations["input_ids"][at][:length]
            )
            assert batch.actions[i] == stock.actions[at][0]
            assert batch.old_values[i] == stock.values[at]
            assert batch.old_log_prob[i] == stock.log_probs[at]
            assert batch.returns[i] == stock.returns[at]
            assert batch.action_masks is not None
            np.testing.assert_array_equal(batch.action_masks[i].numpy(), kept_masks[at[0]][at[1]])


def test_reset_forgets_the_segments():
    ours, _, _ = filled(masks=True)
    ours.reset()
    assert ours.segments == []
    assert ours.packed_masks is None
    with pytest.raises(ValueError, match="has 0 of 9 steps"):
        next(ours.get())
