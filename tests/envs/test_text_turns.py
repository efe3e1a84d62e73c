"""Conversations for agents that write strings: a text is a turn, and what is observed is what was said to it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from chat_templates import TEMPLATES, one
from gymnasium.utils.env_checker import check_env
from text_envs import DEFAULTS, REWARDS, ids, make, play
from tiny_models import EOS, chat_tokenizer, save_chat_model

from textgym.envs import TextActions
from textgym.replies import Reply, ReplyError, ReplyResult

STORY = {"prompt": "story"}
SAID = (" very good", " story", " a great movie")
TURNS: dict[str, Any] = {"max_new_tokens": 3, "max_turns": 3, "max_reply_tokens": 4}
# Of the three turns the first is ended by the agent, the second by its budget.
TEXTS = (" good", " fine warm dull movie", "")
TOKENS = ([*ids("good"), EOS], ids("fine warm dull"), [EOS])
UNUSED = ("", " movie", "")


def say(transcripts: list[list[dict[str, Any]]]) -> list[ReplyResult]:
    """Something else in each turn; what is paid depends on what was said."""
    return [ReplyResult(SAID[len(transcript) // 2], len(transcript[-1]["content"]) / 10) for transcript in transcripts]


def write(**options: Any) -> gym.Env:
    return gym.make("TextWrite-v0", **{**DEFAULTS, "reply": say, **TURNS, **options})


# --- the episodes are those of TextGen-v0


@pytest.mark.parametrize("reward_every", [1, "turn", "end"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["TextWrite-v0", "TextActions"])
def test_a_turn_pays_what_its_tokens_pay(wrapped, reward_every):
    options = {"reward": REWARDS["causal"], "kl_coef": 0.2, "missing_eos_penalty": 0.3, "reward_every": reward_every}
    texts = TextActions(make(reply=say, **TURNS, **options)) if wrapped else write(**options)
    tokens = make(reply=say, **TURNS, **options)
    texts.reset(options=STORY)
    tokens.reset(options=STORY)
    for turn, text in enumerate(TEXTS):
        observation, reward, terminated, truncated, info = texts.step(text)
        steps = play(tokens, TOKENS[turn])
        assert info["tokens"] == TOKENS[turn]
        assert info["unused"] == UNUSED[turn]
        assert info["token_rewards"] == pytest.approx([step[1] for step in steps])
        assert reward == pytest.approx(sum(step[1] for step in steps))
        assert (terminated, truncated) == steps[-1][2:4]
        for name in ("reward_model", "kl", "ref_log_prob", "missing_eos_penalty"):
            assert info[name] == pytest.approx(sum(step[4][name] for step in steps)), name
        for name in ("reply", "reply_reward", "turn", "finish_reason", "completion", "score", "transcript"):
            assert info.get(name) == steps[-1][4].get(name), name
        if not wrapped:
            assert observation == SAID[turn]
    assert truncated
    assert texts.unwrapped.token_ids == tokens.unwrapped.token_ids
    assert [message["content"] for message in info["transcript"][::2]] == [" good", " fine warm dull", ""]


def test_a_stop_string_ends_a_turn_and_what_follows_it_is_unused():
    env = write(stop="film")
    env.reset(options=STORY)
    observation, _, terminated, truncated, info = env.step(" good film and")
    assert (observation, terminated, truncated) == (SAID[0], False, False)
    assert info["tokens"] == ids("good film")
    assert info["unused"] == " and"


def test_a_turn_below_the_minimum_goes_on_with_the_next_text():
    env = write(min_new_tokens=2)
    env.reset(options=STORY)
    observation, *_, info = env.step(" good")  # the end token is the second one, which ends nothing
    assert observation == ""
    assert "turn" not in info
    assert env.step("")[0] == SAID[0]


@pytest.mark.parametrize(("last", "seen"), [(ReplyResult(" bad", done=True), " bad"), (None, "")])
def test_the_last_observation_is_what_the_reply_said_last(last, seen):
    env = write(reply=lambda transcripts: [last])
    env.reset(options=STORY)
    observation, _, terminated, _, info = env.step(" good")
    assert observation == seen
    assert terminated
    assert info["finish_reason"] == "reply"


def test_a_reply_that_was_cut_is_observed_as_the_model_reads_it():
    env = write(reply=lambda transcripts: [" very good story and film"])
    env.reset(options=STORY)
    observation, *_, info = env.step(" good")
    assert info["reply_truncated"]
    assert observation == " very good story and"
    assert env.unwrapped.token_ids[-4:] == ids("very good story and")


@pytest.mark.parametrize("template", ["chatml", "llama 3"])
def test_in_a_chat_template_only_what_was_said_is_observed(template, tmp_path):
    source, special, _ = TEMPLATES[template]
    save_chat_model(tmp_path / "model", chat_tokenizer(special, source, bos="bos_token" in source))
    question = [{"role": "user", "content": "is it good"}]
    env = gym.make(
        "TextWrite-v0", language_model=str(tmp_path / "model"), prompts=[question], reward=one, kl_coef=0.0,
        reply=lambda transcripts: ["why so"], max_turns=3, max_new_tokens=24, max_reply_tokens=24,
    )  # fmt: skip
    env.reset(seed=0)
    assert env.step("yes it is")[0] == "why so"
    assert env.step("well")[0] == "why so"
    answers = [{"role": "assistant", "content": text} for text in ("yes it is", "well")]
    said = {"role": "user", "content": "why so"}
    tokenizer = env.unwrapped.tokenizer
    whole = tokenizer.apply_chat_template(
        [*question, answers[0], said, answers[1], said], tokenize=False, add_generation_prompt=True
    )
    assert env.unwrapped.token_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


# --- errors


@pytest.mark.parametrize("failing", ["reply", "reward"])
def test_a_text_that_an_error_interrupts_can_be_written_again(failing):
    fails = {"reply": 0, "reward": 0}

    def reply(transcripts):
        fails["reply"] -= 1
        if fails["reply"] == 0:
            raise RuntimeError("busy")
        return say(transcripts)

    def reward(completions):
        fails["reward"] -= 1
        if fails["reward"] == 0:
            raise RuntimeError("busy")
        return [len(text) / 7 for text in completions]

    plain, env = write(reward=reward, kl_coef=0.2), write(reply=reply, reward=reward, kl_coef=0.2)
    plain.reset(options=STORY)
    expected = [plain.step(text) for text in TEXTS]
    env.reset(options=STORY)
    found = [env.step(TEXTS[0])]
    fails[failing] = {"reply": 1, "reward": 2}[failing]
    env.unwrapped.report_log_prob([0.0] * 5)
    with pytest.raises(Exception, match="busy"):
        env.step(TEXTS[1])
    with pytest.raises(ValueError, match="action=' good', but an error has interrupted the text ' fine warm"):
        env.step(" good")
    found += [env.step(text) for text in TEXTS[1:]]
    for one_step, other in zip(found, expected, strict=True):
        assert one_step[:4] == (other[0], pytest.approx(other[1]), *other[2:4])
        assert one_step[4]["token_rewards"] == pytest.approx(other[4]["token_rewards"])


def test_a_reset_forgets_a_text_that_an_error_interrupted():
    answers = iter([[3], [" story"]])
    env = write(reply=lambda transcripts: next(answers))
    env.reset(options=STORY)
    with pytest.raises(ReplyError, match="returned int 3"):
        env.step(" good")
    env.reset(options=STORY)
    assert env.step(" fine")[0] == " story"
    assert [message["content"] for message in env.unwrapped.transcript] == [" fine", " story"]


def test_with_a_reply_an_action_is_never_a_part_of_a_turn():
    for make_it in (write, lambda **options: TextActions(make(reply=say, **TURNS), **options)):
        with pytest.raises(ValueError, match="end_of_turn=False, but the environment has a reply"):
            make_it(end_of_turn=False)
        assert make_it(end_of_turn=True)


# --- Gymnasium, and many rows


def test_gymnasiums_checker_has_nothing_to_say():
    options = {"reward": REWARDS["function"], "kl_coef": 0, "max_new_tokens": 8}
    check_env(gym.make("TextWrite-v0", reply=lambda transcripts: [" Why?"], **options).unwrapped)


def test_a_reply_longer_than_all_that_the_model_reads_is_in_the_space():
    env = write(reply=lambda transcripts: [" good" * 30], max_reply_tokens=30, max_total_tokens=6)
    env.reset(options=STORY)
    observation, _, _, truncated, info = env.step(" fine")
    assert observation in env.observation_space
    assert observation == " good" * 4  # as many as there was room for after a turn of two tokens
    assert (truncated, info["finish_reason"], info["reply_truncated"]) == (True, "length", True)


class Counting(Reply):
    """Says how often it was asked by a row in this episode."""

    def __init__(self) -> None:
        self.asked: dict[int, int] = {}

    def begin(self, rows: np.ndarray) -> None:
        self.asked |= dict.fromkeys(rows.tolist(), 0)

    def reply(self, rows: np.ndarray, prompts: Any, transcripts: Any, columns: Any) -> list[str]:
        for row in rows.tolist():
            self.asked[row] += 1
        return [SAID[self.asked[row] - 1] for row in rows.tolist()]


def test_rows_of_a_vector_environment_are_single_ones_with_one_reply():
    counting = Counting()
    options = {**DEFAULTS, **TURNS, "kl_coef": 0.1, "autoreset_mode": "Disabled"}
    envs = gym.make_vec("TextWrite-v0", num_envs=2, reply=counting, **options)
    del options["autoreset_mode"]
    singles = [gym.make("TextWrite-v0", reply=Counting(), **options) for _ in range(2)]
    texts, _ = envs.reset(seed=4)
    assert texts == tuple(env.reset(seed=4 + row)[0] for row, env in enumerate(singles))
    for turn, actions in enumerate([(" good", " film and"), (" this is", ""), ("", " story")]):
        texts, rewards, terminated, truncated, _ = envs.step(actions)
        assert texts == (SAID[turn],) * 2
        for row, env in enumerate(singles):
            text, reward, ended, cut, _ = env.step(actions[row])
            assert (texts[row], terminated[row], truncated[row]) == (text, ended, cut)
            assert rewards[row] == pytest.approx(reward, abs=1e-5)
    assert truncated.all()
    assert counting.asked == {0: 3, 1: 3}
