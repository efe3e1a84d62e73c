"""Texts of several turns outside of an environment: generated and evaluated ones are those of its episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from text_envs import LANGUAGE_MODEL, PROMPTS, REWARDS, make, make_vec
from tiny_agents import tiny_ppo
from tiny_models import tiny_model, tiny_tokenizer

from textgym.agents import PPO
from textgym.evaluation import Evaluation, evaluate, score_tokens
from textgym.language_model import LanguageModel
from textgym.replies import RemoteReply, Reply, ReplyResult, ReplyServer
from textgym.sampling import SamplingSettings

LIMITS: dict[str, Any] = {"max_turns": 3, "max_new_tokens": 4, "max_reply_tokens": 3}
OTHER = LanguageModel(tiny_model("llama", seed=1), tiny_tokenizer())


class Counting(Reply):
    """Says how often it has spoken in an episode, pays for it, and ends some."""

    def __init__(self) -> None:
        self.spoken: dict[int, int] = {}

    def begin(self, rows: np.ndarray) -> None:
        self.spoken |= dict.fromkeys(rows.tolist(), 0)

    def reply(self, rows: Any, prompts: Any, transcripts: Any, columns: Any) -> list[ReplyResult]:
        results = []
        for row, transcript in zip(rows.tolist(), transcripts, strict=True):
            self.spoken[row] += 1
            count, words = self.spoken[row], len(transcript[-1]["content"].split())
            results.append(ReplyResult((" very", " good film", " a")[count - 1], 0.5 * count, done=words == 3))
        return results

    def state_dict(self) -> dict[str, Any]:
        return {"spoken": {str(row): count for row, count in self.spoken.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spoken = {int(row): count for row, count in state["spoken"].items()}


def assert_played(env: Any, prompt: str, transcript: Any, scored: Any) -> None:
    """The environment, with the same actions, gives the same text and pays the same."""
    env.reset(options={"prompt": prompt})
    written = ~np.isnan(scored.rewards)
    for token, reward, kl in zip(
        np.array(scored.token_ids)[written], scored.rewards[written], scored.kl[written], strict=True
    ):
        _, _, terminated, truncated, info = env.step(token)
        paid = info["reward_model"] + info.get("reply_reward", 0.0)
        assert paid == pytest.approx(reward, abs=1e-4)
        assert np.isfinite(kl)
    assert (terminated or truncated, info["finish_reason"]) == (True, scored.finish_reason)
    assert info["transcript"] == transcript
    assert info["completion"] == scored.completion


@pytest.mark.parametrize("reward", ["function", "causal"])
@pytest.mark.parametrize("masking", [False, True])
def test_every_token_is_worth_what_the_environment_pays_for_it(reward: str, masking: bool) -> None:
    masks: dict[str, Any] = {"action_masking": True, "top_k": 9} if masking else {}
    sampling = SamplingSettings(**LIMITS, **masks, temperature=1.3)
    phi = REWARDS[reward]
    scored = score_tokens(LANGUAGE_MODEL, OTHER, phi, PROMPTS * 2, sampling, reply=Counting(), seed=3)
    result = evaluate(LANGUAGE_MODEL, OTHER, phi, PROMPTS * 2, sampling, reply=Counting(), seed=3)
    env = make(reward=phi, reply=Counting(), **LIMITS)
    assert result.turns is not None
    for i, one in enumerate(scored):
        assert_played(env, one.prompt, one.transcript, one)
        assert "".join(one.tokens) != one.completion  # what was said in replies is among the tokens
        assert result.completions[i] == one.completion
        assert result.turns.transcripts[i] == one.transcript
        assert result.kl[i] == pytest.approx(np.nansum(one.kl), abs=1e-3)
        assert result.lengths[i] == np.isfinite(one.rewards).sum()
        assert result.scores[i] == pytest.approx(one.score, abs=1e-4)
        assert sum(result.turns.turn_rewards[i]) == pytest.approx(np.nansum(one.rewards), abs=1e-3)
        assert result.returns[i] - one.prompt_score == pytest.approx(np.nansum(one.rewards), abs=1e-3)
    assert len({one.finish_reason for one in scored}) > 1
    # What a turn earned is what its tokens did.
    first = scored[0].rewards
    begins = np.flatnonzero(~np.isnan(first) & np.isnan(np.append(np.nan, first[:-1])))
    turns = np.add.reduceat(np.nan_to_num(first), begins)
    np.testing.assert_allclose(result.turns.turn_rewards[0], turns, atol=1e-3)


def test_figures_of_turns_are_those_of_the_texts_and_come_back_from_json() -> None:
    result = evaluate(LANGUAGE_MODEL, OTHER, REWARDS["function"], PROMPTS * 3, reply=Counting(), **LIMITS)
    assert result.turns is not None
    figures = result.figures()
    counts = [sum(m["role"] == "assistant" for m in transcript) for transcript in result.turns.transcripts]
    assert figures["turns"] == np.mean(counts)
    paid = [0.5 * sum(range(1, 1 + sum(m["role"] != "assistant" for m in t))) for t in result.turns.transcripts]
    assert figures["reply_reward"] == pytest.approx(np.mean(paid))
    assert figures["return"] == pytest.approx(figures["score"] + figures["reply_reward"])
    for turn in range(max(counts)):
        earned = [rewards[turn] for rewards in result.turns.turn_rewards if len(rewards) > turn]
        assert figures[f"turn_{turn + 1}_reward"] == pytest.approx(np.mean(earned))
    ended = [figures[f"ended_by_{reason}"] for reason in ("reply", "turns", "length")]
    assert sum(ended) == pytest.approx(1)
    assert 0 < ended[0] == np.mean([reason == "reply" for reason in result.finish_reasons])
    assert "eos_rate" not in figures
    assert all(low <= value <= high for value, low, high in result.summary().values())
    assert result.settings["reply"] == "Counting"
    again = Evaluation.from_json(result.to_json())
    assert again.figures() == figures
    assert again.turns is not None
    assert again.turns.transcripts == result.turns.transcripts


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_reply_goes_on_in_the_environment_as_if_nobody_had_evaluated(
    elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def episodes(evaluated: bool) -> list[Any]:
        if not elsewhere:
            return played(Counting(), evaluated)
        with ReplyServer(Counting()) as server:
            return played(RemoteReply(server.url), evaluated)

    def played(reply: Reply, evaluated: bool) -> list[Any]:
        envs = make_vec(3, reply=reply, kl_coef=0.0, **LIMITS)
        envs.reset(seed=0)
        rng, seen = np.random.default_rng(0), []
        for step in range(20):
            if evaluated and step % 3 == 1:
                evaluate(LANGUAGE_MODEL, OTHER, REWARDS["function"], PROMPTS, reply=reply, **LIMITS)
            observation, rewards, *_ = envs.step(rng.integers(4, 60, 3))
            seen.append((observation["input_ids"].tolist(), rewards.tolist()))
        return seen

    assert episodes(evaluated=True) == episodes(evaluated=False)


def test_a_policy_writes_as_it_was_trained_to_with_who_replied_there(tmp_path: Any) -> None:
    reply = Counting()
    envs = make_vec(4, reply=reply, **LIMITS)
    policy = tiny_ppo(envs).policy
    envs.reset(seed=0)
    said = policy.converse(PROMPTS, seed=5)
    assert policy.generate(PROMPTS, seed=5) == [
        "\n".join(m["content"] for m in transcript if m["role"] == "assistant" and m["content"]) for transcript in said
    ]
    scored = score_tokens(policy.language_model, OTHER, REWARDS["function"], PROMPTS, policy.sampling, reply=reply)
    for prompt, one in zip(PROMPTS, scored, strict=True):
        assert_played(make(reply=Counting(), reward=REWARDS["function"], **LIMITS), prompt, one.transcript, one)
    assert any(len(transcript) > 2 for transcript in said)
    assert all(len(transcript) == 2 for transcript in policy.converse(PROMPTS, seed=5, max_turns=1))
    assert all(len(transcript) == 1 for transcript in policy.converse(PROMPTS, seed=5, reply=None))
    assert policy.generate([]) == []

    tiny_ppo(envs).save_pretrained(tmp_path)
    alone = PPO.from_pretrained(tmp_path, device="cpu").policy
    assert alone.sampling == policy.sampling
    with pytest.raises(ValueError, match="give reply="):
        alone.generate(PROMPTS)
    assert [len(transcript) for transcript in alone.converse(PROMPTS, reply=Counting(), max_turns=1)] == [2] * 4
    assert [len(transcript) for transcript in alone.converse(PROMPTS, reply=None)] == [1] * 4


def test_a_larger_budget_of_a_turn_is_not_cut_short_by_that_of_the_text() -> None:
    policy = tiny_ppo(make_vec(4, reply=Counting(), **LIMITS)).policy
    assert policy.sampling.max_total_tokens == 21
    written = policy.converse(["the film"], seed=0, max_new_tokens=30, min_new_tokens=29, action_masking=True)
    assert len(written[0]) == 6
    assert policy.sampling.changed(max_new_tokens=30, max_total_tokens=40).max_total_tokens == 40


def test_limits_of_turns_need_somebody_who_replies() -> None:
    with pytest.raises(ValueError, match="max_turns=2.* give a reply"):
        evaluate(LANGUAGE_MODEL, OTHER, REWARDS["function"], PROMPTS, max_turns=2)
    with pytest.raises(ValueError, match="max_turns=2.* give a reply"):
        tiny_ppo().policy.generate(["the film"], max_turns=2)
    with pytest.raises(ValueError, match="max_turns=0"):
        evaluate(LANGUAGE_MODEL, OTHER, REWARDS["function"], PROMPTS, reply=Counting(), max_turns=0)
    with pytest.raises(ValueError, match="max_total_tokens=3 is less than max_new_tokens=32"):
        SamplingSettings(max_total_tokens=3)
    with pytest.raises(ValueError, match="max_total_tokens=200 are together more than the context"):
        evaluate(LANGUAGE_MODEL, OTHER, REWARDS["function"], PROMPTS, reply=Counting(), max_total_tokens=200)
