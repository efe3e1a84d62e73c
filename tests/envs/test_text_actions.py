"""Text instead of tokens: the wrappers, TextWrite-v0 and its vector form, and the space of texts."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from text_envs import DEFAULTS, MASKING, REWARDS, ids, make, phi, play, reference_log_probs
from tiny_models import EOS

from textgym.envs import TextActions, TextObservations, TextWriteEnv, TextWriteVectorEnv, UnicodeText
from textgym.language_model import LanguageModel, load_language_model

STORY = {"prompt": "story"}


def write(**options: Any) -> gym.Env:
    """TextWrite-v0 on the tiny models; the tokenizer knows words and puts a space between two."""
    return gym.make("TextWrite-v0", **{**DEFAULTS, **options})


def embedded(**options: Any) -> gym.Env:
    """TextWrite-v0 on the embedded language model, whose tokenizer can write everything; the reward costs nothing."""
    options = {"reward": REWARDS["function"], "kl_coef": 0, **options}
    return gym.make("TextWrite-v0", **options)


# --- a text is its tokens


@pytest.mark.parametrize("reward", list(REWARDS))
@pytest.mark.parametrize("wrapped", [False, True], ids=["TextWrite-v0", "wrappers"])
def test_a_text_pays_what_its_tokens_pay(reward, wrapped):
    options = {"reward": REWARDS[reward], "missing_eos_penalty": 0.3, "kl_coef": 0.2}
    texts = TextObservations(TextActions(make(**options))) if wrapped else write(**options)
    tokens = make(**options)
    assert texts.reset(options=STORY)[0] == "story"
    tokens.reset(options=STORY)
    pieces = [" good film", " this is", " a", " great movie but dull"]
    for piece in pieces:
        observation, reward_of_text, terminated, truncated, info = texts.step(piece)
        steps = play(tokens, ids(piece))
        assert reward_of_text == pytest.approx(sum(step[1] for step in steps))
        assert info["token_rewards"] == pytest.approx([step[1] for step in steps])
        assert (terminated, truncated) == steps[-1][2:4]
        for name in ("reward_model", "kl", "ref_log_prob", "missing_eos_penalty"):
            assert info[name] == pytest.approx(sum(step[4][name] for step in steps)), name
        assert type(reward_of_text) is type(info["kl"]) is float
        for name in ("finish_reason", "completion", "score", "prompt"):
            assert info.get(name) == steps[-1][4].get(name), name
    assert truncated
    assert info["missing_eos_penalty"] == 0.3
    assert observation == "story good film this is a great movie but"


def test_rewards_of_texts_telescope_to_the_final_score():
    env = write(reward=REWARDS["composed"], kl_coef=0.1)
    env.reset(options=STORY)
    total = 0.0
    for piece in (" good", " film and", " this story", ""):
        _, reward, terminated, _, info = env.step(piece)
        total += reward + 0.1 * info["kl"]
    assert terminated
    completion = [*ids("good film and this story"), EOS]
    assert info["score"] == pytest.approx(phi("composed", ids("story"), completion), abs=1e-5)
    assert total == pytest.approx(info["score"] - phi("composed", ids("story"), []), abs=1e-5)


def test_the_tokens_are_those_that_encode_says():
    env = embedded().unwrapped
    env.reset(options={"prompt": "the film is"})
    expected = env.encode(" a warm, fu")
    assert env.step(" a warm, fu")[4]["tokens"] == expected
    assert env.step("nny one")[0] == "the film is a warm, funny one"
    assert env.encode("") == [env.vocabulary.eos_token_id]


def test_pieces_may_be_in_any_script_and_special_tokens_are_only_letters():
    env = embedded(max_new_tokens=128)
    env.reset(options={"prompt": "the film is"})
    pieces = [" 很好", "。", "\n\n", "  two spaces", " e\u0301", "</s>", "<s> <pad>", "🙂"]
    text = "the film is"
    for piece in pieces:
        text += piece
        observation, _, terminated, truncated, info = env.step(piece)
        assert observation == text
        assert observation in env.observation_space
        assert info["unused"] == ""
        assert not terminated
        assert not truncated


# --- how an episode ends


@pytest.mark.parametrize(
    ("options", "piece", "written", "unused", "reason"),
    [
        ({"max_new_tokens": 3}, " good film and this story", " good film and", " this story", "length"),
        ({"stop": "film"}, " good film and this story", " good film", " and this story", "stop"),
        ({"max_new_tokens": 3}, " good film and", " good film and", "", "length"),
        ({}, "", "", "", "eos"),
    ],
)
def test_what_comes_after_the_end_is_reported_as_unused(options, piece, written, unused, reason):
    env = write(**options)
    env.reset(options=STORY)
    observation, _, terminated, truncated, info = env.step(piece)
    assert (terminated, truncated) == (reason != "length", reason == "length")
    assert observation == "story" + written
    assert info["unused"] == unused
    assert info["tokens"] == (ids(written) if written else [EOS])
    assert info["completion"] == written
    assert info["finish_reason"] == reason
    with pytest.raises(gym.error.ResetNeeded):
        env.step(" good")


def test_a_character_without_room_for_its_last_bytes_is_unused():
    room = embedded().unwrapped
    room.reset(options={"prompt": "the film"})
    tokens = room.encode(" ok 🙂")
    env = embedded(max_new_tokens=len(tokens) - 1)
    env.reset(options={"prompt": "the film"})
    _, _, _, truncated, info = env.step(" ok 🙂 fine")
    assert truncated
    assert info["tokens"] == tokens[:-1]
    assert info["unused"] == "🙂 fine"


def test_a_wrapper_below_may_end_the_episode_within_a_text():
    env = TextActions(gym.wrappers.TimeLimit(make(), 2))
    env.reset(options=STORY)
    _, _, terminated, truncated, info = env.step(" good film and")
    assert (terminated, truncated) == (False, True)
    assert info["tokens"] == ids("good film")
    assert info["unused"] == " and"


def test_with_end_of_turn_an_action_is_a_whole_turn():
    env = write(end_of_turn=True)
    env.reset(options=STORY)
    assert env.unwrapped.encode(" good film") == [*ids("good film"), EOS]
    observation, _, terminated, _, info = env.step(" good film")
    assert terminated
    assert observation == "story good film"
    assert info["finish_reason"] == "eos"
    assert info["tokens"] == [*ids("good film"), EOS]
    env.reset(options=STORY)
    assert env.step("")[4]["tokens"] == [EOS]


def test_the_empty_text_ends_nothing_before_the_minimum_length():
    env = write(min_new_tokens=2)
    env.reset(options=STORY)
    assert not env.step("")[2]
    assert env.step(" good")[0] == "story good"
    assert env.step("")[2]


# --- log-probabilities


@pytest.mark.parametrize("make_env", [write, lambda **o: TextActions(make(**o))], ids=["TextWrite-v0", "wrapper"])
def test_the_kl_of_a_text_is_that_of_its_reported_log_prob(make_env):
    env = make_env()
    report = env.get_wrapper_attr("report_log_prob")
    piece = " good film and"
    env.reset(options=STORY)
    reference = reference_log_probs(ids("story"), ids(piece))
    report(-5.0)
    assert env.step(piece)[4]["kl"] == pytest.approx(-5.0 - reference.sum(), abs=1e-5)
    assert env.step(" dull")[4]["kl"] > 0  # a report holds for one step: log π = 0
    env.reset(options=STORY)
    report([-1.0, -0.5, -3.0])
    info = env.step(piece)[4]
    assert info["kl"] == pytest.approx(-4.5 - reference.sum(), abs=1e-5)
    assert info["ref_log_prob"] == pytest.approx(reference.sum(), abs=1e-5)
    env.reset(options=STORY)
    report([-1.0, -0.5, -3.0])
    env.reset(options=STORY)
    assert env.step(piece)[4]["kl"] == pytest.approx(-reference.sum(), abs=1e-5)


def test_log_probs_are_those_of_the_tokens_in_order():
    estimate = {}
    for report in ([-1.0, -0.5, -3.0], [-3.0, -0.5, -1.0], -4.5, [-1.5] * 3):
        env = write(kl_estimator="k2").unwrapped
        env.reset(options=STORY)
        env.report_log_prob(report)
        estimate[str(report)] = env.step(" good film and")[4]["kl"]
    reference = reference_log_probs(ids("story"), ids("good film and"))
    assert estimate["[-1.0, -0.5, -3.0]"] == pytest.approx(0.5 * ((np.array([-1, -0.5, -3]) - reference) ** 2).sum())
    assert estimate["[-3.0, -0.5, -1.0]"] != pytest.approx(estimate["[-1.0, -0.5, -3.0]"])
    assert estimate["-4.5"] == pytest.approx(estimate["[-1.5, -1.5, -1.5]"])  # equal parts


@pytest.mark.parametrize("wrong", [0.5, float("nan"), -float("inf"), [-1.0, 2.0], [[-1.0]]])
def test_what_is_no_log_prob_is_refused(wrong):
    env = write().unwrapped
    env.reset()
    with pytest.raises(ValueError, match="log_prob"):
        env.report_log_prob(wrong)


def test_a_wrong_number_of_log_probs_is_an_error_that_changes_nothing():
    env = write().unwrapped
    text, _ = env.reset(options=STORY)
    env.report_log_prob([-1.0, -1.0])
    with pytest.raises(ValueError, match="2 log-probabilities were reported and the text has 3 tokens"):
        env.step(" good film and")
    assert env.token_ids == ids(text)
    assert env.step(" good")[4]["kl"] > 0  # and they are gone


# --- wrong input


@pytest.mark.parametrize("action", [3, None, ["good"], np.int64(3), b"good"])
def test_an_action_that_is_no_text_is_an_error(action):
    env = write()
    env.reset(options=STORY)
    with pytest.raises(TypeError, match="must be a text"):
        env.step(action)


@pytest.mark.parametrize("action", [" xylophone", "good", " good\ud800"])
def test_a_text_that_cannot_be_written_is_an_error_that_changes_nothing(action):
    env = write()
    env.reset(options=STORY)
    with pytest.raises(ValueError, match=r"can't write|is not a text"):
        env.step(action)
    assert env.step(" good")[0] == "story good"


def test_stepping_before_a_reset_is_an_error():
    for env in (write().unwrapped, TextActions(make().unwrapped)):
        with pytest.raises(gym.error.ResetNeeded):
            env.step(" good")


def test_only_token_environments_can_be_wrapped():
    for wrapper in (TextActions, TextObservations):
        with pytest.raises(ValueError, match="is not a TextGen-v0"):
            wrapper(gym.make("CartPole-v1"))
        with pytest.raises(ValueError, match="is not a TextGen-v0"):
            wrapper(write())
    with pytest.raises(ValueError, match="writes tokens to TextGen-v0"):
        TextActions(TextActions(make()))
    with pytest.raises(TypeError, match="end_of_turn='yes' must be True or False"):
        TextActions(make(), end_of_turn="yes")
    with pytest.raises(TypeError, match="autoreset_mode is an option of vector environments"):
        write(autoreset_mode="SameStep")
    with pytest.raises(TypeError, match="argument 'max_new_token'; did you mean max_new_tokens"):
        write(max_new_token=3)


# --- Gymnasium


@pytest.mark.parametrize("options", [{}, {"end_of_turn": True}, {"kl_coef": 0.05, **MASKING, "top_k": 0}])
def test_gymnasiums_checker_has_nothing_to_say(options):
    check_env(embedded(**options).unwrapped)


def test_random_actions_can_be_played():
    env = embedded()
    env.action_space.seed(0)
    lengths = []
    for seed in range(5):
        text, _ = env.reset(seed=seed)
        assert text in env.observation_space
        length, done = 0, False
        while not done:
            text, _, terminated, truncated, _ = env.step(env.action_space.sample())
            assert text in env.observation_space
            length, done = length + 1, terminated or truncated
        lengths.append(length)
    assert max(lengths) > 2


def test_wrappers_may_stand_in_either_order_and_be_made_again_from_the_spec():
    tokens = make()
    envs = [
        TextObservations(TextActions(tokens, end_of_turn=True)),
        TextActions(TextObservations(make()), end_of_turn=True),
        gym.make(TextObservations(TextActions(make(), end_of_turn=True)).spec),
    ]
    results = []
    for env in envs:
        assert env.reset(options=STORY)[0] == "story"
        results.append(env.step(" good film")[:4])
    assert results[0][0] == "story good film"
    assert results[0] == results[1] == results[2]
    assert envs[2].unwrapped.options.language_model is tokens.unwrapped.options.language_model


def test_a_spec_makes_the_environment_again_and_shares_its_models():
    env = write(end_of_turn=True)
    again = gym.make(env.spec)
    assert again.unwrapped.options.language_model is env.unwrapped.options.language_model
    again.reset(options=STORY)
    assert again.step(" good")[2]
    assert gym.make("TextWrite-v0", end_of_turn=True).spec.to_json()


def test_statistics_count_texts_outside_and_tokens_inside():
    statistics = gym.wrappers.RecordEpisodeStatistics
    outside, inside = statistics(write()), TextActions(statistics(make()))
    for env, length in ((outside, 2), (inside, 5)):
        env.reset(options=STORY)
        env.step(" good film and this")
        info = env.step("")[4]
        assert info["episode"]["l"] == length


def test_seeds_are_those_of_the_token_environment():
    texts, tokens = write(), make()
    for seed in (3, None, None):
        assert texts.reset(seed=seed)[1]["prompt"] == tokens.reset(seed=seed)[1]["prompt"]
    assert texts.unwrapped.np_random_seed == 3


def test_the_penalty_and_the_rendering_are_the_token_environments():
    env = write(render_mode="ansi")
    env.reset(options=STORY)
    env.step(" good film")
    assert "good" in re.sub(r"\x1b\[[0-9;]*m", "", env.render())
    env.unwrapped.kl_coef = 0.0
    _, reward, _, _, info = env.step(" and")
    assert reward == pytest.approx(info["reward_model"])
    env.close()


# --- many rows


@pytest.mark.parametrize("mode", ["vector_entry_point", "sync"])
def test_rows_of_a_vector_environment_are_single_ones(mode):
    sync = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP} if mode == "sync" else {}
    options = {**DEFAULTS, "reward": REWARDS["composed"], "max_new_tokens": 4}
    envs = gym.make_vec("TextWrite-v0", num_envs=2, vectorization_mode=mode, vector_kwargs=sync, **options)
    singles = [write(**options) for _ in range(2)]
    texts, _ = envs.reset(seed=4)
    assert texts == tuple(env.reset(seed=4 + i)[0] for i, env in enumerate(singles))
    for actions in [(" good", " film and"), (" this is", " dull"), ("", " story"), (" good", " good")]:
        texts, rewards, terminated, truncated, infos = envs.step(actions)
        for i, env in enumerate(singles):
            text, reward, ended, cut, info = env.step(actions[i])
            assert rewards[i] == pytest.approx(reward, abs=1e-5)
            assert (terminated[i], truncated[i]) == (ended, cut)
            got = infos["final_info"] if ended or cut else infos
            assert got["tokens"][i] == info["tokens"]
            assert got["unused"][i] == info["unused"]
            if ended or cut:
                assert infos["final_obs"][i] == text
                text, _ = env.reset()
            assert texts[i] == text
    envs.close()


def test_without_shared_memory_rows_may_live_in_processes_of_their_own():
    envs = gym.make_vec(
        "TextWrite-v0",
        num_envs=2,
        vectorization_mode="async",
        vector_kwargs={"shared_memory": False},
        kl_coef=0,
        max_new_tokens=4,
    )
    try:
        envs.reset(seed=0, options={"prompt": "the film is"})
        assert envs.step((" good", " 好"))[0] == ("the film is good", "the film is 好")
    finally:
        envs.close()


def test_rows_share_one_language_model_and_one_reward():
    envs = gym.make_vec("TextWrite-v0", num_envs=3, autoreset_mode="Disabled")
    assert isinstance(envs, TextWriteVectorEnv)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED
    assert len({id(env._process.language_model.held) for env in envs.envs}) == 1
    assert len({id(env.reward) for env in envs.envs}) == 1
    assert all(type(env) is TextWriteEnv for env in envs.envs)


def test_the_seed_option_gives_every_row_a_prompt_of_its_own():
    options = {**DEFAULTS, "prompts": lambda rng: f"story {'good ' * rng.integers(9)}", "seed": 5}
    first, again = (TextWriteVectorEnv(4, **options).reset()[0] for _ in range(2))
    assert first == again
    assert len(set(first)) > 1


@pytest.mark.parametrize("num_envs", [0, -1, 1.5, True, "2"])
def test_a_wrong_number_of_rows_is_an_error(num_envs):
    with pytest.raises((TypeError, ValueError), match=f"num_envs={num_envs!r}"):
        TextWriteVectorEnv(num_envs, **DEFAULTS)


# --- an agent that is a language model


class Writer:
    """A language model that reads a text and writes words: the next one, or nothing more."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @torch.no_grad()
    def log_probs(self, ids: list[int]) -> torch.Tensor:
        return self.model.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)  # (L, V)

    def word(self, text: str) -> str:
        """The next word, sampled, with the space before it."""
        ids, word = self.model.encode(text), ""
        for _ in range(8):
            token = int(torch.multinomial(self.log_probs(ids)[-1].exp(), 1))
            longer = self.model.tokenizer.decode([*ids, token], skip_special_tokens=True)[len(text) :]
            if token == self.model.eos_token_id or (word.strip() and longer[len(word) :].startswith(" ")):
                break
            ids, word = [*ids, token], longer
        return word

    def log_probs_of(self, text: str, tokens: list[int]) -> list[float]:
        """Of the tokens that the environment makes of a word."""
        ids = self.model.encode(text)
        rows = self.log_probs([*ids, *tokens])[len(ids) - 1 : -1]
        return rows[torch.arange(len(tokens)), tokens].clamp(max=0).tolist()


def test_a_language_model_writes_words_and_its_kl_to_itself_is_zero():
    env = gym.make("TextWrite-v0", prompts="test", max_new_tokens=16)
    agent = Writer(load_language_model("embedded", device="cpu"))
    words = 0
    for seed in range(3):
        text, _ = env.reset(seed=seed)
        done, kl, returns = False, 0.0, 0.0
        while not done:
            word = agent.word(text)
            env.unwrapped.report_log_prob(agent.log_probs_of(text, env.unwrapped.encode(word)))
            text, reward, terminated, truncated, info = env.step(word)
            words += 1
            kl, returns, done = kl + info["kl"], returns + reward, terminated or truncated
        assert kl == pytest.approx(0.0, abs=1e-3)
        assert text == info["prompt"] + info["completion"]
        assert abs(returns) < 2
    assert words > 5


# --- the space


def test_the_space_has_every_text_of_a_length_that_fits():
    space = UnicodeText(5, min_length=1)
    for text in ("a", "电影", "e\u0301🙂\n ", "</s>"):
        assert text in space
    for wrong in ("", "sixsix", "\ud800", 3, None, b"a"):
        assert wrong not in space
    assert isinstance(space, spaces.Text)


def test_samples_of_the_space_are_short_and_seeded():
    space = UnicodeText(400)
    space.seed(1)
    samples = [space.sample() for _ in range(50)]
    assert {len(text) for text in samples} <= set(range(17))
    assert len(set(samples)) > 40
    assert all(text in space for text in samples)
    space.seed(1)
    assert [space.sample() for _ in range(50)] == samples
    assert len(space.sample(mask=(40, None))) == 40
    assert len(UnicodeText(3).sample(probability=(None, None))) <= 3
    with pytest.raises(ValueError, match="a length of 401 is not between 0 and 400"):
        space.sample(mask=(401, None))
    with pytest.raises(ValueError, match=r"mask\[1\] must be None"):
        space.sample(mask=(None, np.ones(3, dtype=np.int8)))


def test_the_space_compares_copies_and_flattens():
    space = UnicodeText(12, min_length=1)
    assert space == UnicodeText(12, min_length=1)
    assert space != UnicodeText(12)
    assert space != spaces.Text(12)
    for same in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert same == space
    text = "电影 🙂 e\u0301"
    flat = spaces.flatten(space, text)
    assert flat in spaces.flatten_space(space)
    assert spaces.unflatten(space, flat) == text
    assert repr(space) == "UnicodeText(12, min_length=1)"
    assert "x" in space.character_set
    assert "xy" not in space.character_set
