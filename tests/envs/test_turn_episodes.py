"""Episodes of several turns: who spoke, what it earns, and that nothing of it depends on the schedule or the rows."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3
from text_envs import LANGUAGE_MODEL, REWARDS, ids, make, make_vec, phi, play, random_actions, reference_log_probs
from tiny_models import EOS

from textgym.replies import Reply, ReplyError, ReplyResult
from textgym.rewards import FunctionReward, RewardError

TURNS: dict[str, Any] = {"max_new_tokens": 3, "max_turns": 3, "max_reply_tokens": 4, "max_prompt_tokens": 12}


def say(prompts: list[str], transcripts: list[list[dict[str, Any]]], **columns: Any) -> list[Any]:
    """Something else in each turn; what is paid depends on what was said."""
    results = []
    for transcript in transcripts:
        turns = sum(message["role"] == "assistant" for message in transcript)
        points = len(transcript[-1]["content"]) / 10
        results.append(ReplyResult((" very good", " story", " a great movie")[turns - 1], points))
    return results


def actions_of(row: int, steps: int) -> list[int]:
    rng = np.random.default_rng(row)
    tokens = rng.integers(4, 60, steps).tolist()
    return [EOS if rng.random() < 0.2 else token for token in tokens]


def test_both_environment_checkers_pass():
    env = make(reply=say, **TURNS)
    check_env(env.unwrapped, skip_render_check=True)
    check_env_of_sb3(env.unwrapped)


def test_a_turn_ends_as_a_text_does_elsewhere_and_the_reply_is_read_behind_it():
    env = make(reply=say, **TURNS)
    observation, _ = env.reset(options={"prompt": "the film"})
    seen = []
    for token in [*ids("good"), EOS, *ids("fine warm dull"), *ids("bad"), EOS]:
        observation, _, terminated, truncated, info = env.step(token)
        seen.append((info.get("reply"), info.get("turn"), terminated, truncated))
    assert seen == [
        (None, None, False, False),
        (" very good", 1, False, False),
        (None, None, False, False),
        (None, None, False, False),
        (" story", 2, False, False),
        (None, None, False, False),
        (" a great movie", 3, False, True),
    ]
    text = [*ids("the film good"), EOS, *ids("very good fine warm dull story bad"), EOS, *ids("a great movie")]
    assert observation["input_ids"][: observation["attention_mask"].sum()].tolist() == text
    spoken = [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    assert observation["completion_mask"][: len(text)].tolist() == spoken
    assert not observation["completion_mask"][len(text) :].any()
    assert info["finish_reason"] == "turns"
    assert info["completion"] == " good\n fine warm dull\n bad"
    assert info["transcript"] == [
        {"role": "assistant", "content": " good"},
        {"role": "user", "content": " very good"},
        {"role": "assistant", "content": " fine warm dull"},
        {"role": "user", "content": " story"},
        {"role": "assistant", "content": " bad"},
        {"role": "user", "content": " a great movie"},
    ]


@pytest.mark.parametrize("reward_every", [1, 2, "turn"])
@pytest.mark.parametrize("reward", ["causal"])
def test_what_a_reply_does_to_the_text_is_earned_by_the_action_that_ended_the_turn(reward, reward_every):
    env = make(reply=say, reward=REWARDS[reward], reward_every=reward_every, kl_coef=0.1, **TURNS)
    env.reset(options={"prompt": "the film"})
    start, tokens = ids("the film"), [*ids("good"), EOS, *ids("fine warm dull"), *ids("bad"), EOS]
    # The whole text after each action, written down by hand.
    said = {2: ids("very good"), 5: ids("story"), 7: ids("a great movie")}
    states, written = [[]], []
    for count, token in enumerate(tokens, start=1):
        states.append([*states[-1], token, *said.get(count, [])])
        written.append(len(states[-2]))
    potentials = [phi(reward, start, state) for state in states]
    due = {1: range(1, 8), 2: [2, 4, 6, 7], "turn": [2, 5, 7]}[reward_every]
    steps = play(env, tokens)
    log_ref = reference_log_probs(start, states[-1])
    paid_at = 0
    for count, (step, position) in enumerate(zip(steps, written, strict=True), start=1):
        model_part = 0.0
        if count in due:
            model_part, paid_at = potentials[count] - potentials[paid_at], count
        points = {2: len(" good") / 10, 5: len(" fine warm dull") / 10, 7: len(" bad") / 10}.get(count, 0.0)
        kl = -log_ref[position]  # a deterministic agent's
        assert step[4]["reward_model"] == pytest.approx(model_part, abs=1e-4)
        assert step[4]["kl"] == pytest.approx(kl, abs=1e-4)
        assert step[1] == pytest.approx(model_part + points - 0.1 * kl, abs=1e-4)
    total = sum(step[4]["reward_model"] for step in steps)
    assert total == pytest.approx(potentials[-1] - potentials[0], abs=1e-4)


@pytest.mark.parametrize("reward_every", [1, 3, "turn", "end"])
@pytest.mark.parametrize("reward", ["function", "causal", "composed"])
def test_both_schedules_pay_the_same_whatever_the_turns_and_cuts(reward, reward_every):
    scores = []
    for deferred in (True, False):
        envs = make_vec(
            5,
            reply=say,
            reward=REWARDS[reward],
            reward_every=reward_every,
            kl_coef=0.3,
            missing_eos_penalty=0.5,
            **TURNS,
        )
        envs.reset(seed=4)
        rng = np.random.default_rng(1)
        found = []
        for _ in range(3):
            envs.begin_rollout(defer_scoring=deferred)
            rewards = []
            for _ in range(7):
                actions, log_probs = random_actions(rng, envs, eos_weight=1.2)
                rewards.append(envs.step(actions, log_probs)[1])
            found.append(envs.scores())
            if not deferred:
                np.testing.assert_allclose(found[-1].rewards, np.stack(rewards), atol=1e-5)
            envs.end_rollout()
        scores.append(found)
    for late, soon in zip(*scores, strict=True):
        np.testing.assert_allclose(late.rewards, soon.rewards, atol=1e-4)
        np.testing.assert_allclose(late.kl, soon.kl, atol=1e-4)
        assert len(late.episodes) == len(soon.episodes)
        for one, other in zip(late.episodes, soon.episodes, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert value == (pytest.approx(other[name], abs=1e-3) if isinstance(value, float) else other[name])
    assert any(found.episodes for found in scores[0])


def test_rows_of_a_vector_environment_behave_like_single_ones():
    envs = make_vec(3, reply=say, kl_coef=0.2, **TURNS)
    envs.reset(seed=7)
    singles = [make(reply=say, kl_coef=0.2, **TURNS) for _ in range(3)]
    for row, env in enumerate(singles):
        env.reset(seed=7 + row)
    plans = [actions_of(row, 12) for row in range(3)]
    for step in range(12):
        observation, rewards, *_ = envs.step(np.array([plan[step] for plan in plans]))
        for row, env in enumerate(singles):
            alone, reward, terminated, truncated, _ = env.step(plans[row][step])
            assert reward == pytest.approx(rewards[row], abs=1e-4)
            if terminated or truncated:
                alone, _ = env.reset()
            for name, value in alone.items():
                np.testing.assert_array_equal(observation[name][row], value)


@pytest.mark.parametrize("limit", [2, 3, 4, 5])
def test_gymnasiums_own_limit_of_steps_ends_episodes_within_turns_and_between_them(limit):
    envs = make_vec(1, reply=say, kl_coef=0.0, max_episode_steps=limit, **TURNS)
    envs.reset(seed=0)
    truncated, steps = False, 0
    while not truncated:
        _, _, terminated, truncated, _ = envs.step(np.array(ids("good")))
        steps += 1
        assert not terminated[0]
    assert steps == limit


def test_a_reply_that_says_it_is_done_or_nothing_ends_the_episode():
    for last, text in ((ReplyResult(" bad", 2.0, done=True), " bad"), (None, None)):
        env = make(reply=lambda transcripts, last=last: [last], kl_coef=0.0, **TURNS)
        env.reset(options={"prompt": "the film"})
        env.step(ids("good")[0])
        _, reward, terminated, truncated, info = env.step(EOS)
        assert (terminated, truncated, info["finish_reason"]) == (True, False, "reply")
        assert info["reply"] == text
        assert info["reply_reward"] == (2.0 if text else 0.0)
        assert reward == pytest.approx(info["reward_model"] + info["reply_reward"])


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda transcripts: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda transcripts: [], "returned 0 replies for 1 turns; expected one for each"),
        (lambda transcripts: "good", "returned str 'good'; expected a list of 1 texts"),
        (lambda transcripts: [3], "row 0: returned int 3; expected a text, a ReplyResult, or None"),
        (lambda transcripts: [ReplyResult("a", float("nan"))], "paid reward=nan; expected a finite number"),
        (lambda transcripts: ["\ud800"], "half of a surrogate pair"),
        (lambda prompts, wanted: ["a"], "raised TypeError"),
    ],
)
def test_a_reply_that_fails_is_named_and_nothing_is_lost(answer, complaint):
    working = [False]

    def reply(**given: Any) -> Any:
        return [" story"] if working[0] else answer(**{k: v for k, v in given.items() if k == "transcripts"})

    env = make(reply=reply, kl_coef=0.2, **TURNS)
    env.reset(options={"prompt": "the film"})
    before, *_ = env.step(ids("good")[0])
    with pytest.raises(ReplyError, match=complaint):
        env.step(EOS)
    np.testing.assert_array_equal(env.unwrapped._rows.observation()["input_ids"][0], before["input_ids"])
    working[0] = True
    env.unwrapped.report_log_prob(0.0)
    observation, *_ = env.step(EOS)
    assert observation["attention_mask"].sum() == before["attention_mask"].sum() + 2


def test_nobody_is_asked_twice_when_the_reward_behind_a_reply_fails():
    asked, failing = [], [True]

    def reply(transcripts: Any) -> list[str]:
        asked.append(len(transcripts))
        return [" story"]

    def reward(prompts: Any, completions: Any, transcripts: Any) -> list[float]:
        if failing[0] and any(message["role"] == "user" for message in transcripts[0]):
            raise RuntimeError("away")
        return [1.0]

    env = make(reply=reply, reward=reward, kl_coef=0.0, **TURNS)
    env.reset(options={"prompt": "the film"})
    env.step(ids("good")[0])
    with pytest.raises(RewardError, match="away"):
        env.step(EOS)
    failing[0] = False
    env.step(EOS)
    assert asked == [1]


def test_a_reply_longer_than_its_room_is_cut_and_said_so_or_refused():
    long = lambda transcripts: [" very good story of a great movie"]  # noqa: E731
    env = make(reply=long, **TURNS)
    env.reset(options={"prompt": "the film"})
    env.step(ids("good")[0])
    observation, *_, info = env.step(EOS)
    assert info["reply_truncated"]
    assert observation["attention_mask"].sum() == 2 + 2 + TURNS["max_reply_tokens"]
    # No room in the episode.
    env = make(reply=long, max_total_tokens=5, **TURNS)
    env.reset(options={"prompt": "the film"})
    env.step(ids("good")[0])
    observation, _, _, truncated, info = env.step(EOS)
    assert (truncated, info["finish_reason"], info["reply_truncated"]) == (True, "length", True)
    assert observation["attention_mask"].sum() == 2 + 5
    env = make(reply=long, reply_overflow="error", **TURNS)
    env.reset(options={"prompt": "the film"})
    env.step(ids("good")[0])
    with pytest.raises(ReplyError, match="said 7 tokens, more than max_reply_tokens=4; say less"):
        env.step(EOS)


def test_a_reply_of_no_words_is_a_message_and_the_next_turn_begins():
    env = make(reply=lambda transcripts: [""], kl_coef=0.0, **TURNS)
    env.reset(options={"prompt": "the film"})
    env.step(ids("good")[0])
    *_, info = env.step(EOS)
    assert (info["reply"], info["reply_truncated"], info["turn"]) == ("", False, 1)
    env.step(ids("bad")[0])
    *_, terminated, truncated, info = env.step(EOS)
    assert not terminated
    assert not truncated
    assert [message["content"] for message in env.unwrapped.transcript] == [" good", "", " bad", ""]


def test_rows_that_are_over_are_not_replied_to():
    asked = []

    class Asked(Reply):
        def reply(self, rows: np.ndarray, prompts: Any, transcripts: Any, columns: Any) -> list[str | None]:
            asked.append(rows.tolist())
            return [None if row == 1 else " story" for row in rows.tolist()]

    envs = make_vec(3, reply=Asked(), kl_coef=0.0, **{**TURNS, "max_new_tokens": 1})
    envs.reset(seed=0)
    envs.begin_round(3, 1)
    for _ in range(3):
        envs.step(np.array(ids("good good good")))
    assert asked == [[0, 1, 2], [0, 2], [0, 2]]
    refused = make(reply=lambda transcripts: [" story"] * 2, kl_coef=0.0, **TURNS)
    refused.reset(options={"prompt": "the film"})
    with pytest.raises(ReplyError, match="returned 2 replies for 1 turns; expected one for each"):
        refused.step(EOS)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_turns": 0}, "max_turns=0 must be"),
        ({"max_turns": 2, "reply": None}, "max_turns=2 is of episodes in which somebody replies: give a reply"),
        ({"max_total_tokens": 2}, "max_total_tokens=2 is less than max_new_tokens=3"),
        ({"reply": "hello"}, "reply='hello' must be file.py:function"),
        ({"reply_overflow": "cut"}, "reply_overflow='cut' must be"),
        ({"reward_every": "turns"}, "or 'turn' or 'end'"),
        ({"max_new_tokens": 120, "max_prompt_tokens": 8}, "is no more than one turn of max_new_tokens=120"),
    ],
)
def test_impossible_options_are_named(options, complaint):
    with pytest.raises((ValueError, TypeError), match=complaint):
        make(**{**TURNS, "reply": say, **options})


class Counting(Reply):
    """Remembers how often each row was asked."""

    def __init__(self, rows: int) -> None:
        self.asked = np.zeros(rows, dtype=np.int64)

    def begin(self, rows: np.ndarray) -> None:
        self.asked[rows] = 0

    def reply(self, rows: np.ndarray, prompts: Any, transcripts: Any, columns: Any) -> list[str]:
        self.asked[rows] += 1
        return [(" good", " story", " very good")[count - 1] for count in self.asked[rows]]

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked[:] = state["asked"]


def test_a_state_taken_amid_a_turn_goes_on_as_if_it_was_never_stopped():
    envs, again = (make_vec(4, reply=Counting(4), kl_coef=0.2, **TURNS) for _ in range(2))
    envs.reset(seed=3)
    plans = np.array([actions_of(row, 20) for row in range(4)]).T
    for actions in plans[:7]:
        envs.step(actions)
    again.reset(seed=9)
    again.load_state_dict(envs.state_dict())
    envs.forget_cached()
    for actions in plans[7:]:
        one, other = envs.step(actions), again.step(actions)
        for name in one[0]:
            np.testing.assert_array_equal(one[0][name], other[0][name])
        np.testing.assert_array_equal(one[1], other[1])


def test_the_minimum_length_is_one_of_turns():
    envs = make_vec(1, reply=say, **{**TURNS, "max_new_tokens": 4}, min_new_tokens=2, action_masking=True)
    envs.reset(seed=0)
    lengths = []
    for _ in range(2):
        turn = 0
        while True:
            allowed = envs.action_masks()[0, EOS]
            assert allowed == (turn >= 2)
            token = EOS if allowed else ids("good")[0]
            *_, infos = envs.step(np.array([token]))
            turn += 1
            if "reply" in infos:
                break
        lengths.append(turn)
    assert lengths == [3, 3]


def test_pictures_and_terminals_show_who_spoke(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    env = make(reply=say, render_mode="ansi", kl_coef=0.0, reward=lambda completions: [0.0] * len(completions), **TURNS)
    env.reset(options={"prompt": "the film"})
    for token in [*ids("good"), EOS, *ids("fine")]:
        env.step(token)
    text, status = env.render().splitlines()
    assert text == "the film| good·[+0.50]{ very good} fine"
    assert "3 tokens" in status
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[2m very good\x1b[0m" in env.render()
    pictures = [make(reply=say, render_mode="rgb_array", **TURNS) for _ in range(2)]
    for steps, picture in zip((1, 2), pictures, strict=True):
        picture.reset(options={"prompt": "the film"})
        for token in [*ids("good"), EOS][:steps]:
            picture.step(token)
    shorter, longer = (picture.render() for picture in pictures)
    assert (shorter != longer).any()


def test_asynchronous_replies_are_waited_for():
    async def later(transcripts: Any) -> list[str]:
        return [" story"]

    env = make(reply=later, **TURNS)
    env.reset(seed=0)
    env.step(ids("good")[0])
    assert env.step(EOS)[4]["reply"] == " story"


def test_wrappers_and_specs_share_the_reply():
    reply = Counting(1)
    env = gym.make(
        "TextGen-v0",
        language_model=LANGUAGE_MODEL,
        prompts=["a"],
        reply=reply,
        reward=lambda completions: [0.0] * len(completions),
    )
    assert env.unwrapped.reply is reply
    assert gym.make(env.spec).unwrapped.reply is reply


class Patient(Reply):
    """Says less in each turn, differently in each episode that it has begun, and remembers all that."""

    def __init__(self) -> None:
        self.episodes = 0
        self.asked: dict[int, int] = {}

    def begin(self, rows: np.ndarray) -> None:
        self.episodes += len(rows)
        self.asked |= dict.fromkeys(rows.tolist(), self.episodes % 3)

    def reply(self, rows: np.ndarray, prompts: Any, transcripts: Any, columns: Any) -> list[str]:
        said = [" good" * (4 - self.asked[row]) for row in rows.tolist()]
        for row in rows.tolist():
            self.asked[row] = min(self.asked[row] + 1, 3)
        return said

    def state_dict(self) -> dict[str, Any]:
        return {"episodes": self.episodes, "asked": dict(self.asked)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.episodes, self.asked = state["episodes"], dict(state["asked"])


def test_normalized_rewards_are_calibrated_on_whole_conversations():
    judged: list[list[list[dict[str, Any]]]] = []

    def words_of_others(transcripts: list[list[dict[str, Any]]]) -> list[float]:
        judged.append(transcripts)
        return [sum(len(m["content"].split()) for m in t if m["role"] == "user") for t in transcripts]

    numbers = []
    for _ in range(2):
        judged.clear()
        patient = Patient()
        reward = FunctionReward(words_of_others).normalized()
        envs = make_vec(2, reply=patient, reward=reward, reward_every="end", kl_coef=0, **TURNS)
        envs.reset(seed=0)
        conversations = [conversation for batch in judged for conversation in batch]
        assert len(conversations) == 256
        assert {len(conversation) for conversation in conversations} == {6}  # three turns, three replies
        words = [sum(len(m["content"].split()) for m in c[1::2]) for c in conversations]
        assert (reward.mean, reward.std) == pytest.approx((np.mean(words), np.std(words)))
        assert patient.state_dict() == {"episodes": 2, "asked": {0: 2, 1: 2}}  # only of the environment's episodes
        numbers.append((reward.mean, reward.std))
    assert numbers[0] == numbers[1]
    assert numbers[0][1] > 0


def test_a_reply_that_fails_while_a_reward_is_calibrated_is_named():
    reward = FunctionReward(lambda completions: [len(text) for text in completions]).normalized()
    env = make(reply=lambda transcripts: [None], reward=reward, **TURNS)
    with pytest.raises(ReplyError, match="returned 1 replies for"):
        env.reset()
