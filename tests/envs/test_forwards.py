"""TextGen-v0 with many rows: how many forwards of which model a step and a rollout take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from text_envs import ids, make_vec, random_actions
from tiny_models import EOS, VOCABULARY, tiny_causal_reward_model, tiny_model, tiny_tokenizer

from textgym.language_model import LanguageModel
from textgym.rewards.models.causal import CausalRewardModel

V = len(VOCABULARY)
GOOD, FILM = ids("good film")


class Forwards:
    """``(B, T)`` of what goes through a model's trunk."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.base_model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def take(self) -> list[tuple[int, int]]:
        taken, self.shapes = self.shapes, []
        return taken


@pytest.fixture
def counted():
    """Models of an environment's own, and counters of their forwards."""
    model, reward = tiny_model("llama"), tiny_causal_reward_model()
    options = {
        "language_model": LanguageModel(model, tiny_tokenizer()),
        "reward": CausalRewardModel(reward, tiny_tokenizer()),
        "max_new_tokens": 20,
    }
    return options, Forwards(model), Forwards(reward)


@pytest.mark.parametrize("masking", [{}, {"action_masking": True, "top_k": 30, "top_p": 0.95}], ids=["plain", "top-k"])
def test_an_instant_step_is_one_forward_of_one_token_for_each_model(counted, masking):
    options, reference, reward = counted
    envs = make_vec(6, **options, **masking)
    envs.reset(seed=0)
    envs.step(np.full(6, GOOD))  # the first step reads the prompts
    reference.take(), reward.take()
    for _ in range(9):
        envs.step(np.full(6, FILM))
        assert reference.take() == [(6, 1)]
        assert reward.take() == [(6, 1)]
    envs.step(np.array([EOS, *[FILM] * 5]))
    envs.step(np.full(6, FILM))
    # Two steps, and one new prompt, read when it begins or at the step after.
    assert sum(rows * tokens for rows, tokens in reference.take()) <= 2 * 6 + 7 + 1


def test_nobody_asks_what_could_follow_a_finished_text(counted):
    options, reference, _ = counted
    envs = make_vec(2, **options, action_masking=True, top_k=30, autoreset_mode="Disabled")
    envs.reset(seed=0)
    envs.step(np.full(2, GOOD))
    reference.take()
    *_, infos = envs.step(np.full(2, EOS))
    assert reference.take() == []
    assert infos["action_mask"].sum(1).tolist() == [V - 3] * 2  # the special tokens are masked as ever


def test_the_reward_model_reads_only_where_a_score_is_due(counted):
    options, _, reward = counted
    envs = make_vec(2, **options, reward_every=4)
    envs.reset(seed=0)
    reward.take()
    shapes = []
    for _ in range(8):
        envs.step(np.full(2, FILM))
        shapes.append(reward.take())
    assert shapes == [[], [], [], [(2, 4)]] * 2


def test_deferred_scoring_is_a_few_passes_however_many_steps(counted):
    options, reference, reward = counted
    envs, rng = make_vec(6, **options), np.random.default_rng(0)
    envs.reset(seed=0)
    envs.begin_rollout()
    reference.take(), reward.take()
    for _ in range(40):
        envs.step(*random_actions(rng, envs))
    assert reference.take() == reward.take() == []
    envs.scores()
    assert len(reference.take()) == len(reward.take()) == 1
