"""Learning from episodes of several turns: what others say is read and never learned from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3 import PPO as StockPPO
from stable_baselines3.common.logger import Logger
from stock_twins import assert_same_update, stock_twin, with_rollout
from tiny_agents import KeepRollouts, logs_of_learning, tiny_language_model, tiny_ppo, tiny_vector_env, values_of
from tiny_models import EOS

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


def say_or_not(transcripts: list[list[dict[str, Any]]]) -> list[ReplyResult | None]:
    """What :func:`say` says, nothing to a text with an "o" in it, and an end after some."""
    ends = [sum(map(ord, transcript[-1]["content"])) % 5 == 0 for transcript in transcripts]
    said = [
        ReplyResult("", one.reward) if "o" in transcript[-1]["content"] else one
        for one, transcript in zip(say(transcripts), transcripts, strict=True)
    ]
    return [None if end else one for one, end in zip(said, ends, strict=True)]


def turns_of(actions: list[int], longest: int) -> list[int]:
    """Which turn each token of an episode belongs to: one ends with the end token, or after so many."""
    turns, turn, length = [], 0, 0
    for token in actions:
        turns.append(turn)
        length += 1
        if token == EOS or length == longest:
            turn, length = turn + 1, 0
    return turns


def group_agent(name: str, credit: str, env: Any, **arguments: Any) -> Any:
    own = {"scale": "group"} if name == "GRPO" else {}
    defaults = {"group_size": 4, "gamma": 0.9, "max_grad_norm": 1e9, "seed": 0, "device": "cpu", **own}
    return getattr(agents, name)("LanguageModelPolicy", env, credit=credit, **{**defaults, **arguments})


@pytest.mark.parametrize("name", ["RLOO", "GRPO"])
def test_turn_credit_is_the_gradient_of_single_steps_judged_turn_by_turn(name):
    model = group_agent(name, "turn", talking_env(8, reply=say_or_not, temperature=0.9))
    callback = model._setup_learn(1000)[1]
    buffer = model.rollout_buffer
    assert model.collect_rollouts(model.env, callback, buffer, model.n_steps)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the policy that wrote, so that ratios are clipped here and there
        for parameter in model.policy.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    parameters = list(model.policy.parameters())

    segments = sorted(buffer.segments, key=lambda segment: segment.episode)
    turns = [turns_of(segment.ids[segment.positions].tolist(), 4) for segment in segments]
    assert {max(of) for of in turns} == {0, 1, 2}
    unseen = [np.diff(turn)[np.diff(s.positions) == 1].any() for turn, s in zip(turns, segments, strict=True)]
    assert any(unseen)  # turns with nothing said between them
    rewards = [buffer.rewards[segment.steps_in_rollout, segment.row].tolist() for segment in segments]

    def worth(episode: int, turn: int) -> float:
        if turn not in turns[episode]:
            return 0.0
        begin = turns[episode].index(turn)
        return sum(0.9**k * reward for k, reward in enumerate(rewards[episode][begin:]))

    loss = torch.zeros(())
    for episode, segment in enumerate(segments):
        group = range(episode // 4 * 4, episode // 4 * 4 + 4)
        log_ratios = []
        for step, place in enumerate(segment.positions):
            ids = torch.as_tensor(segment.ids[:place])[None]
            logits = model.policy.language_model.model(input_ids=ids).logits[0, -1] / 0.9
            old = buffer.log_probs[segment.start + step, segment.row]
            log_ratios.append(logits.log_softmax(-1)[segment.ids[place]] - float(old))
        for turn in range(max(turns[episode]) + 1):
            mine = torch.stack([log for log, of in zip(log_ratios, turns[episode], strict=True) if of == turn])
            if name == "RLOO":
                others = np.mean([worth(other, turn) for other in group if other != episode])
                advantage, ratios = worth(episode, turn) - others, mine.sum().exp()[None]
                count = 1
            else:
                mean, returns = np.mean([worth(other, turn) for other in group]), [worth(other, 0) for other in group]
                advantage, ratios = (worth(episode, turn) - mean) / (np.std(returns, ddof=1) + 1e-4), mine.exp()
                count = segment.steps
            clipped = torch.minimum(ratios * advantage, ratios.clamp(0.8, 1.2) * advantage)
            loss = loss - clipped.sum() / count / len(segments)
    expected = torch.autograd.grad(loss, parameters, allow_unused=True)

    found: list[torch.Tensor | None] = []
    model.policy.optimizer.step = lambda: found.extend(parameter.grad for parameter in parameters)
    model.set_logger(Logger(None, []))
    model.train()
    scale = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    assert scale > 1e-3
    for ours, by_hand in zip(found, expected, strict=True):
        assert (ours is None) == (by_hand is None)  # of the value head
        if ours is not None:
            torch.testing.assert_close(ours, by_hand, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["RLOO", "GRPO"])
def test_with_one_turn_turn_credit_is_completion_credit(name):
    weights = []
    for credit in ("completion", "turn"):
        model = group_agent(name, credit, tiny_vector_env(8), n_epochs=2, batch_size=16)
        model.learn(64)
        weights.append(list(model.policy.state_dict().values()))
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


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
