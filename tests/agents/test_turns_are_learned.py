"""Learning from episodes of several turns: what others say is read and never learned from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO as StockPPO
from stock_twins import assert_same_update, stock_twin, with_rollout
from tiny_agents import KeepRollouts, logs_of_learning, tiny_language_model, tiny_ppo, tiny_vector_env, values_of

from textgym import agents
from textgym.agents import EpisodeBuffer
from textgym.engine.cached_model import CachedModel
from textgym.envs.sb3 import as_vec_env
from textgym.replies import ReplyResult

SAID = (" very good", " story", " a great movie")


def say(transcripts: list[list[dict[str, Any]]]) -> list[ReplyResult]:
    """Something else in each turn; short turns are paid for."""
    turns = [sum(message["role"] == "assistant" for message in transcript) for transcript in transcripts]
    words = [len(transcript[-1]["content"].split()) for transcript in transcripts]
    return [ReplyResult(SAID[turn % 3], 1.0 - count / 3) for turn, count in zip(turns, words, strict=True)]


def talking_env(rows: int = 4, **options: Any) -> Any:
    turns = {"reply": say, "max_turns": 3, "max_new_tokens": 4, "max_reply_tokens": 4}
    return tiny_vector_env(rows, **{**turns, **options})


def moved(**arguments: Any) -> Any:
    return with_rollout(talking_env(temperature=0.9), **arguments)


@pytest.mark.parametrize("clip_range_vf", [None, 0.05])
def test_one_update_equals_that_of_stock_ppo_over_single_steps(clip_range_vf):
    model = moved(clip_range_vf=clip_range_vf, clip_range=0.1, ent_coef=0.01, normalize_advantage=True)
    assert len(model.rollout_buffer._said) > 8  # replies within segments
    assert_same_update(model, stock_twin(model))


def test_segments_hold_the_transcripts_and_their_actions_are_what_was_chosen():
    model = moved()
    buffer: EpisodeBuffer = model.rollout_buffer
    taken = np.zeros_like(buffer.active)
    for segment in buffer.segments:
        chosen = buffer.actions[segment.steps_in_rollout, segment.row, 0]
        np.testing.assert_array_equal(segment.ids[segment.positions], chosen)
        taken[segment.steps_in_rollout, segment.row] = True
        others = np.setdiff1d(np.arange(len(segment.prefix), segment.length), segment.positions)
        text = model.env.text_env.tokenizer.decode(segment.ids[others])
        assert set(text.split()) <= set(" ".join(SAID).split())
    assert taken.all()


def test_an_update_reads_each_transcript_once_however_many_turns_it_has(monkeypatch):
    model = moved()
    read = []
    hidden_at = CachedModel.hidden_at

    def counted(self: CachedModel, input_ids: Any, lengths: np.ndarray, *arguments: Any) -> Any:
        read.append(int(np.sum(lengths)))
        return hidden_at(self, input_ids, lengths, *arguments)

    monkeypatch.setattr(CachedModel, "hidden_at", counted)
    segments = model.rollout_buffer.segments
    model.train()
    assert sum(read) == sum(segment.length for segment in segments)


AGENTS: dict[str, dict[str, Any]] = {
    "PPO": {"n_steps": 16},
    "A2C": {"n_steps": 16},
    "NLPO": {"n_steps": 16},
    "TRPO": {"n_steps": 16},
    "REINFORCE": {},
    "RLOO": {"group_size": 2},
    "GRPO": {"group_size": 2},
    "SARSA": {},
    "QLearning": {},
    "SoftQLearning": {},
    "ExpertIteration": {"group_size": 2},
    "DPO": {"group_size": 2},
}


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_learns_from_talks_with_ratio_one_and_no_kl_at_the_start(name):
    kl = {} if name in ("SoftQLearning",) else {"kl_coef": 0.1}
    env = talking_env(**kl)
    model = getattr(agents, name)("LanguageModelPolicy", env, seed=0, device="cpu", **AGENTS[name])
    before = [parameter.clone() for parameter in model.policy.parameters()]
    callback = KeepRollouts()
    logs = logs_of_learning(model, 96, callback=callback)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    if kl and name not in ("NLPO", "QLearning", "SARSA"):  # which draw from other distributions
        assert values_of(logs, "rollout/kl_ref")[0] == pytest.approx(0.0, abs=1e-3)
    lengths = [episode["l"] for episodes in callback.episodes for episode in episodes]
    assert lengths
    assert max(lengths) <= 12
    assert any(episode["completion"].count("\n") for episodes in callback.episodes for episode in episodes)


def test_a_reward_of_the_reply_is_learned():
    """Turns that end at once are paid most: the policy learns to end them."""
    model = tiny_ppo(
        talking_env(8, kl_coef=0.0, reward=lambda completions: [0.0] * len(completions)),
        n_steps=24,
        batch_size=64,
        learning_rate=3e-3,
    )
    callback = KeepRollouts()
    model.learn(4000, callback=callback)
    first, last = callback.episodes[0], callback.episodes[-1]
    assert np.mean([episode["r"] for episode in last]) > np.mean([episode["r"] for episode in first]) + 0.5


def test_stock_ppo_runs_on_turns_unmodified():
    env = as_vec_env(talking_env(2))
    model = StockPPO(
        agents.LanguageModelPolicy, env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu",
        policy_kwargs={"language_model": tiny_language_model()},
    )  # fmt: skip
    model.learn(16)
    assert model.num_timesteps == 16


def test_log_probs_of_a_rollout_are_those_of_a_plain_forward_of_the_transcript():
    model = tiny_ppo(talking_env(), n_steps=20)
    callback = model._setup_learn(1000)[1]
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    plain = model.policy.language_model.model
    for segment in model.rollout_buffer.segments:
        with torch.no_grad():
            logits = plain(input_ids=torch.as_tensor(segment.ids)[None]).logits[0].log_softmax(-1)
        expected = logits[segment.positions - 1, segment.ids[segment.positions]]
        found = model.rollout_buffer.log_probs[segment.steps_in_rollout, segment.row]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
