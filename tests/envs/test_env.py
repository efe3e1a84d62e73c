"""TextGen-v0 as a single environment: interface, episodes, rewards, KL, options, errors."""

from __future__ import annotations

import asyncio
import copy
import re
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from text_envs import (
    DEFAULTS,
    LANGUAGE_MODEL,
    MASKING,
    PROMPTS,
    REWARD_MODEL,
    REWARDS,
    TOKENIZER,
    ids,
    make,
    phi,
    play,
    reference_log_probs,
    text_score,
)
from tiny_models import BOS, CONTEXT, EOS, PAD, UNK, VOCABULARY, tiny_causal_reward_model, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from written_texts import completed

from textgym.envs import TextGenEnv
from textgym.generation import complete, complete_texts
from textgym.language_model import LanguageModel
from textgym.prompts.opening import as_prompt_source
from textgym.rewards import FunctionReward, Reward, RewardError
from textgym.rewards.models.causal import CausalRewardModel

V = len(VOCABULARY)
WORDS = list(range(4, V))
GOOD, FILM = ids("good film")


# --- Gymnasium and Stable-Baselines3


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0}, MASKING, {"reward": REWARD_MODEL, "reward_every": "end"}])
def test_the_checkers_of_gymnasium_and_stable_baselines3_have_nothing_to_say(options, capsys):
    env = make(**options)
    check_env(env.unwrapped)  # a warning would fail the test; makes the environment in every render mode
    check_env_sb3(env.unwrapped)


def test_an_episode_renders_in_every_mode(capsys):
    frames = {}
    for mode in ("ansi", "rgb_array", "human"):
        env = make(render_mode=mode)
        env.reset(seed=0, options={"prompt": "the film"})
        play(env, [GOOD, FILM])
        frames[mode] = env.render()
    assert isinstance(frames["ansi"], str)
    assert "the film" in frames["ansi"]
    assert frames["rgb_array"].dtype == np.uint8
    assert frames["rgb_array"].ndim == 3
    assert frames["human"] is None
    assert capsys.readouterr().out.count("the film") == 3  # the reset and two steps


def test_observations_are_right_padded_and_a_step_changes_one_position():
    env = make()
    observation, _ = env.reset(options={"prompt": "the film was good"})
    prompt = ids("the film was good")
    length = DEFAULTS["max_prompt_tokens"] + DEFAULTS["max_new_tokens"]
    for name, shape, dtype in [
        ("input_ids", (length,), np.int64),
        ("attention_mask", (length,), np.int8),
        ("prompt_length", (1,), np.int64),
    ]:
        assert observation[name].shape == shape
        assert observation[name].dtype == dtype
    for count, token in enumerate([GOOD, UNK, PAD, BOS, FILM]):
        assert observation["input_ids"][: len(prompt)].tolist() == prompt
        assert observation["input_ids"][len(prompt) + count :].tolist() == [PAD] * (length - len(prompt) - count)
        assert observation["attention_mask"].tolist() == [1] * (len(prompt) + count) + [0] * (
            length - len(prompt) - count
        )
        assert observation["prompt_length"].tolist() == [len(prompt)]
        assert env.observation_space.contains(observation)
        before, (observation, *_) = observation, env.step(token)
        changed = np.flatnonzero(before["input_ids"] != observation["input_ids"]).tolist()
        assert changed == ([] if token == PAD else [len(prompt) + count])
        assert np.flatnonzero(before["attention_mask"] != observation["attention_mask"]).tolist() == [
            len(prompt) + count
        ]


def test_what_a_caller_does_to_an_observation_or_a_mask_does_not_reach_the_environment():
    spoiled, untouched = make(**MASKING), make(**MASKING)
    for env in (spoiled, untouched):
        env.reset(seed=0)
    for _ in range(4):
        (observation, *_, info), expected = spoiled.step(GOOD), untouched.step(GOOD)
        np.testing.assert_equal(observation, expected[0])
        np.testing.assert_array_equal(info["action_mask"], expected[-1]["action_mask"])
        assert info["kl"] == pytest.approx(expected[-1]["kl"], abs=1e-5)
        for array in (*observation.values(), info["action_mask"], spoiled.unwrapped.action_masks()):
            array[...] = 0


def test_rewards_and_flags_are_plain_python_and_infos_scalars():
    env = make(missing_eos_penalty=0.5)
    env.reset(seed=0)
    (*_, (_, reward, terminated, truncated, info)) = play(env, [GOOD] * 8)
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)
    assert {name: type(value) for name, value in info.items()} == {
        "reward_model": float,
        "kl": float,
        "ref_log_prob": float,
        "missing_eos_penalty": float,
        "score": float,
        "applies": bool,
        "finish_reason": str,
        "prompt": str,
        "completion": str,
    }


# --- how episodes end


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({}, [GOOD, EOS], "eos"),
        ({}, [EOS], "eos"),
        ({}, [GOOD] * 8, "length"),
        ({}, [GOOD] * 7 + [EOS], "eos"),
        ({"stop": "good film"}, [FILM, GOOD, FILM], "stop"),
        ({"stop": ["!", "bad ."]}, ids("the film was bad ."), "stop"),
        ({"stop": "d f"}, [GOOD, FILM], "stop"),  # inside two tokens
        ({"stop": "good"}, [FILM] * 7 + [GOOD], "stop"),  # with the last token of the budget
        ({"min_new_tokens": 3}, [EOS, GOOD, EOS, EOS], "eos"),
        ({"min_new_tokens": 8}, [EOS] * 8, "length"),
        ({"min_new_tokens": 3, "stop": "good"}, [GOOD, FILM, GOOD], "stop"),
        ({"min_new_tokens": 4, "stop": "good film"}, [FILM, GOOD, FILM, FILM, GOOD, FILM], "stop"),
        # A stop string that began before the minimum and is complete with it.
        ({"min_new_tokens": 3, "stop": "good film bad"}, ids("good film bad"), "stop"),
        ({"min_new_tokens": 4, "stop": "good film bad"}, ids("good film bad") + [FILM] * 5, "length"),
    ],
)
def test_why_an_episode_ends(options, tokens, reason):
    env = make(**options)
    env.reset(options={"prompt": "good film !"})  # the prompt's own stop strings don't count
    steps = play(env, [*tokens, *[FILM] * 9])
    assert len(steps) == len(tokens)
    _, _, terminated, truncated, info = steps[-1]
    assert (terminated, truncated) == (reason != "length", reason == "length")
    assert info["finish_reason"] == reason
    assert info["prompt"] == "good film !"
    kept = TOKENIZER.decode([*ids("good film !"), *tokens], skip_special_tokens=True)
    assert info["prompt"] + info["completion"] == kept
    for *_, terminated, truncated, info in steps[:-1]:
        assert not terminated
        assert not truncated
        assert "finish_reason" not in info


def test_stop_strings_are_looked_for_from_the_beginning_of_every_episode():
    env = make(stop="good")
    for _ in range(2):
        env.reset(options={"prompt": "the film"})
        assert len(play(env, [FILM] * 9)) == 8
        env.reset(options={"prompt": "the film"})
        assert len(play(env, [GOOD] * 8)) == 1


def test_a_stop_string_may_not_reach_into_the_prompt():
    env = make(stop="film good")
    env.reset(options={"prompt": "the film"})
    assert len(play(env, [GOOD, *[FILM] * 9])) == 8


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, as byte fallback does with characters a tokenizer lacks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("stop", ["。", "好。", "é", "🙂"])
def test_stop_strings_whose_characters_take_several_tokens(stop):
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, bos_token_id=None, eos_token_id=0, max_position_embeddings=64, **shape)
    )
    env = make(language_model=LanguageModel(model, tokenizer), stop=stop, max_new_tokens=20, prompts=["一"])
    env.reset()
    tokens = tokenizer("好好" + stop)["input_ids"]
    steps = play(env, [*tokens, *tokens])
    assert len(steps) == len(tokens)
    assert steps[-1][-1]["finish_reason"] == "stop"
    assert steps[-1][-1]["completion"] == "好好" + stop


def test_the_missing_eos_penalty_is_paid_where_the_budget_ran_out_and_only_there():
    for tokens, penalty in [([GOOD] * 8, 0.7), ([GOOD, FILM, EOS], 0.0)]:
        paid = {}
        for value in (0.0, 0.7):
            env = make(missing_eos_penalty=value)
            env.reset(options={"prompt": "story"})
            paid[value] = [step[1] for step in play(env, tokens)]
            infos = [step[-1].get("missing_eos_penalty") for step in play_infos(env, tokens)]
            assert infos == ([None] * len(tokens) if not value else [0.0] * (len(tokens) - 1) + [penalty])
        expected = [0.0] * (len(tokens) - 1) + [penalty]
        np.testing.assert_allclose(np.subtract(paid[0.0], paid[0.7]), expected, atol=1e-12)


def play_infos(env, tokens):
    env.reset(options={"prompt": "story"})
    return play(env, tokens)


def test_padding_with_end_of_sequence_changes_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"
    shared = make(language_model=LanguageModel(LANGUAGE_MODEL.model, tokenizer), min_new_tokens=3)
    apart = make(min_new_tokens=3)
    assert shared.unwrapped.tokenizer.pad_token_id == EOS
    tokens = [GOOD, EOS, EOS, FILM, EOS]
    observations = [env.reset(options={"prompt": "story"})[0] for env in (shared, apart)]
    assert (observations[0]["input_ids"] == EOS).sum() > 0
    for mine, other in zip(play(shared, tokens), play(apart, tokens), strict=True):
        real = mine[0]["attention_mask"] == 1
        assert (mine[0]["attention_mask"] == other[0]["attention_mask"]).all()
        assert (mine[0]["input_ids"][real] == other[0]["input_ids"][real]).all()
        assert mine[1:] == other[1:]


# --- prompts


LONG = "this was a very very slow and dull film but the end is great"  # 14 tokens


def test_long_prompts_are_cut_on_the_left_with_one_warning_when_they_are_loaded():
    with pytest.warns(UserWarning, match="14 tokens is longer than max_prompt_tokens=5, as are 1 others of 3") as told:
        env = make(prompts=[LONG, "story", f"so {LONG}"], max_prompt_tokens=5)
    assert len(told) == 1
    for _ in range(4):  # another warning would fail the test
        observation, info = env.reset()
        if info["prompt"] != "story":
            assert observation["prompt_length"] == [5]
            assert observation["input_ids"][:5].tolist() == ids("but the end is great")
            assert info["prompt"] == "but the end is great"


def test_a_long_prompt_that_comes_later_is_cut_with_one_warning():
    env = make(prompts=["story"], max_prompt_tokens=5)
    with pytest.warns(UserWarning, match="14 tokens is longer than max_prompt_tokens=5"):
        env.reset(options={"prompt": LONG})
    assert env.reset(options={"prompt": LONG})[1]["prompt"] == "but the end is great"


def test_long_prompts_are_an_error_on_request():
    with pytest.raises(ValueError, match="14 tokens is longer than max_prompt_tokens=5.*raise max_prompt_tokens"):
        make(prompts=["story", LONG], max_prompt_tokens=5, prompt_overflow="error")
    env = make(prompts=["story"], max_prompt_tokens=5, prompt_overflow="error")
    for _ in range(2):
        with pytest.raises(ValueError, match="14 tokens is longer than max_prompt_tokens=5"):
            env.reset(options={"prompt": LONG})


def test_the_first_token_survives_the_cut_where_it_is_beginning_of_sequence():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    with pytest.warns(UserWarning, match="15 tokens"):
        env = make(language_model=LanguageModel(LANGUAGE_MODEL.model, tokenizer), prompts=[LONG], max_prompt_tokens=4)
    observation, _ = env.reset()
    assert observation["input_ids"][:4].tolist() == [BOS, *ids("end is great")]


def test_the_budget_of_the_prompt_is_what_the_context_leaves():
    with pytest.raises(ValueError, match=f"together more than the model's context of {CONTEXT}"):
        make(max_prompt_tokens=100, max_new_tokens=29)
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        make(max_prompt_tokens=None, max_new_tokens=CONTEXT)
    widths = {
        new: make(max_prompt_tokens=None, max_new_tokens=new).observation_space["input_ids"].shape[0]
        for new in (8, 100)
    }
    assert widths == {8: 64 + 8, 100: CONTEXT}


def test_reset_options_choose_the_prompt():
    env = make()
    observation, info = env.reset(options={"prompt": "fresh music"})
    assert info == {"prompt": "fresh music"}
    assert observation["input_ids"][: observation["prompt_length"][0]].tolist() == ids("fresh music")


@pytest.mark.parametrize("prompt", ["", 3, ["a", "b"], [""]])
def test_reset_refuses_what_is_no_prompt(prompt):
    with pytest.raises((ValueError, TypeError), match="options\\['prompt'\\]|must be"):
        make().unwrapped.reset(options={"prompt": prompt})


def test_unknown_reset_options_are_errors():
    with pytest.raises(ValueError, match=r"unknown reset options \['promt'\]; known are 'prompt'"):
        make().unwrapped.reset(options={"promt": "the film"})


@pytest.mark.parametrize("prompts", [[], ["fine", ""], "the film", [3], [{"text": "film"}], 7])
def test_wrong_prompts_are_errors_when_the_environment_is_made(prompts):
    with pytest.raises((ValueError, TypeError), match="prompt"):
        make(prompts=prompts)


def test_a_prompt_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="the tokenizer makes no token of the prompt '   '"):
        make(prompts=["   "]).reset()


# --- seeds


def prompts_of(env: gym.Env, seeds: list[int | None]) -> list[str]:
    return [env.reset(seed=seed)[1]["prompt"] for seed in seeds]


def test_a_seed_repeats_the_prompts_and_without_one_they_go_on():
    many = [f"{word} film" for word in VOCABULARY[4:]]
    runs = [prompts_of(make(prompts=many), [seed, *[None] * 9]) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 5
    env = make(prompts=many)
    assert prompts_of(env, [3, None, None]) == prompts_of(env, [3, None, None]) == runs[0][:3]


def test_the_seed_option_is_that_of_the_first_reset():
    many = [f"{word} film" for word in VOCABULARY[4:]]
    expected = prompts_of(make(prompts=many), [5, None, None])
    assert prompts_of(make(prompts=many, seed=5), [None, None, None]) == expected
    assert prompts_of(make(prompts=many, seed=6), [5, None, None]) == expected


def test_without_any_seed_runs_differ():
    many = [f"{a} {b}" for a in VOCABULARY[4:] for b in VOCABULARY[4:]]
    assert prompts_of(make(prompts=many), [None] * 4) != prompts_of(make(prompts=many), [None] * 4)


def test_the_random_numbers_are_where_gymnasium_looks_for_them():
    env = make(prompts=lambda rng: f"film {VOCABULARY[rng.integers(4, V)]}")
    env.reset(seed=11)
    assert env.unwrapped.np_random_seed == 11
    twin = np.random.Generator(np.random.PCG64(11))
    twin.integers(4, V)
    assert env.unwrapped.np_random.random() == twin.random()


# --- rewards


tokens_strategy = st.lists(st.sampled_from([*WORDS, *WORDS, EOS, UNK, PAD]), min_size=8, max_size=8)


@settings(max_examples=40)
@given(
    tokens=tokens_strategy,
    prompt=st.sampled_from(PROMPTS),
    reward=st.sampled_from(list(REWARDS)),
    reward_every=st.sampled_from([1, 2, 3, 7, 100, "end"]),
    kl_coef=st.sampled_from([0.0, 0.05, 2.0]),
    penalty=st.sampled_from([0.0, 0.3]),
)
def test_rewards_telescope_to_the_final_score(tokens, prompt, reward, reward_every, kl_coef, penalty):
    env = make(reward=REWARDS[reward], reward_every=reward_every, kl_coef=kl_coef, missing_eos_penalty=penalty)
    env.reset(options={"prompt": prompt})
    steps = play(env, tokens)
    taken = tokens[: len(steps)]
    infos = [step[-1] for step in steps]
    final, start = phi(reward, ids(prompt), taken), phi(reward, ids(prompt), [])
    worth = final if reward_every == "end" else final - start
    kl = sum(info["kl"] for info in infos) if kl_coef else 0.0
    missing = penalty if infos[-1]["finish_reason"] == "length" else 0.0
    tolerance = 1e-9 if reward == "function" else 1e-5
    assert sum(step[1] for step in steps) == pytest.approx(worth - kl_coef * kl - missing, abs=tolerance)
    assert sum(info["reward_model"] for info in infos) == pytest.approx(worth, abs=tolerance)
    assert infos[-1]["score"] == pytest.approx(final, abs=tolerance)


@pytest.mark.parametrize("reward", list(REWARDS))
@pytest.mark.parametrize("reward_every", [1, 3, "end"])
def test_each_reward_is_the_difference_of_scores_since_the_last_one(reward, reward_every):
    env = make(reward=REWARDS[reward], reward_every=reward_every, kl_coef=0)
    tokens = ids("film was very very dull but fine and")
    env.reset(options={"prompt": "the film"})
    got = [step[1] for step in play(env, tokens)]
    last = 0.0 if reward_every == "end" else phi(reward, ids("the film"), [])
    expected = []
    for count in range(1, 9):
        due = count == 8 or (reward_every != "end" and count % reward_every == 0)
        score = phi(reward, ids("the film"), tokens[:count]) if due else last
        expected.append(score - last)
        last = score
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.count_nonzero(got) == {1: 8, 3: 3, "end": 1}[reward_every]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("reported", [False, True])
def test_rewards_and_infos_follow_the_formula(estimator, temperature, masking, reported):
    env = make(
        kl_coef=0.3,
        kl_estimator=estimator,
        temperature=temperature,
        missing_eos_penalty=0.2,
        action_masking=masking,
        min_new_tokens=2,
    )
    _, info = env.reset(options={"prompt": "we love"})
    prompt, tokens = ids("we love"), ids("the music and script but the actor was")
    log_probs = -np.linspace(0.1, 4, 8) if reported else None
    steps = play(env, tokens, log_probs)

    masks = None
    if masking:
        masks = np.ones((8, V))
        masks[:, [PAD, BOS, UNK]] = 0
        masks[:2, EOS] = 0
        shown = [info["action_mask"], *(step[-1]["action_mask"] for step in steps[:-1])]
        np.testing.assert_array_equal(shown, masks)
    reference = reference_log_probs(prompt, tokens, temperature, masks)
    d = (0.0 if log_probs is None else log_probs) - reference
    kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[estimator]
    scores = np.array([phi("function", prompt, tokens[:n]) for n in range(9)])
    penalty = np.eye(8)[7] * 0.2
    infos = [step[-1] for step in steps]
    np.testing.assert_allclose([i["ref_log_prob"] for i in infos], reference, atol=2e-5)
    np.testing.assert_allclose([i["kl"] for i in infos], kl, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose([i["reward_model"] for i in infos], np.diff(scores), atol=1e-9)
    np.testing.assert_allclose([s[1] for s in steps], np.diff(scores) - 0.3 * kl - penalty, atol=2e-4, rtol=1e-4)


def test_a_token_chosen_against_the_mask_is_paid_for_and_not_an_infinite_loss():
    env = make(action_masking=True, min_new_tokens=4)
    env.reset(options={"prompt": "we love"})
    for count, token in enumerate([EOS, PAD, UNK]):
        *_, info = env.step(token)
        masks = np.ones((count + 1, V))
        masks[:, [PAD, BOS, UNK, EOS]] = 0
        masks[-1, token] = 1
        taken = [EOS, PAD, UNK][: count + 1]
        masks[range(count + 1), taken] = 1
        expected = reference_log_probs(ids("we love"), taken, 1.0, masks)[-1]
        assert info["ref_log_prob"] == pytest.approx(expected, abs=1e-4)


def test_a_reported_log_prob_holds_for_one_step():
    env = make()
    env.reset(options={"prompt": "story"})
    env.unwrapped.report_log_prob(-1.5)
    steps = play(env, [GOOD, FILM])
    for step, log_prob in zip(steps, [-1.5, 0.0], strict=True):
        assert step[-1]["kl"] == pytest.approx(log_prob - step[-1]["ref_log_prob"])
    env.unwrapped.report_log_prob(-1.5)
    env.reset()
    *_, info = env.step(GOOD)
    assert info["kl"] == pytest.approx(-info["ref_log_prob"])


@pytest.mark.parametrize("wrong", [0.5, float("nan"), -float("inf")])
def test_what_is_no_log_prob_is_refused(wrong):
    env = make()
    env.reset()
    with pytest.raises(ValueError, match=r"is not a log-probability \(finite, at most 0\)"):
        env.unwrapped.report_log_prob(wrong)


def test_the_same_text_pays_the_same_whatever_was_written_before():
    env = make(reward=REWARDS["composed"])
    paid = []
    for prompt in ("the film", "a great movie is", "the film"):
        env.reset(options={"prompt": prompt})
        paid.append([step[1] for step in play(env, [*ids("was good and funny"), EOS])])
    np.testing.assert_allclose(paid[0], paid[2], atol=1e-5)
    assert np.abs(np.subtract(paid[0], paid[1])).max() > 0.01


# --- models that need not be there


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a language model and a reward model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("language_model", "reward")}
    tiny_model("llama").save_pretrained(folders["language_model"])
    tiny_causal_reward_model().save_pretrained(folders["reward"])
    for folder in folders.values():
        tiny_tokenizer().save_pretrained(folder)
    return {name: str(folder) for name, folder in folders.items()}


def forbid_loading(monkeypatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)


def test_without_a_penalty_no_reference_model_is_loaded(saved, monkeypatch):
    with monkeypatch.context() as during:
        forbid_loading(during)
        env = make(language_model=saved["language_model"], kl_coef=0, action_masking=True, min_new_tokens=2)
        env.reset(options={"prompt": "the film"})
        steps = play(env, [GOOD, FILM, EOS])
        with pytest.raises(AssertionError, match="was loaded"):
            make(language_model=saved["language_model"], kl_coef=0.01)
    for step in steps:
        assert not {"kl", "ref_log_prob"} & set(step[-1])
        assert step[1] == step[-1]["reward_model"]


def test_the_coefficient_may_be_changed_at_any_time(saved):
    env = make(language_model=saved["language_model"], kl_coef=0)
    env.reset(options={"prompt": "the film"})
    tokens = [GOOD, FILM, FILM, GOOD]
    reference = reference_log_probs(ids("the film"), tokens)
    for coefficient, token, log_prob in zip([0.0, 0.5, 2.0, 0.0], tokens, reference, strict=True):
        env.unwrapped.kl_coef = coefficient
        assert env.unwrapped.kl_coef == coefficient
        _, reward, *_, info = env.step(token)
        kl = -log_prob if coefficient else 0.0
        assert reward == pytest.approx(info["reward_model"] - coefficient * kl, abs=1e-4)
    assert info["kl"] == pytest.approx(-reference[-1], abs=1e-4)  # still measured


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf")])
def test_a_wrong_coefficient_is_refused(wrong):
    env = make()
    with pytest.raises(ValueError, match="kl_coef=.* must be a finite number at least 0"):
        env.unwrapped.kl_coef = wrong
    assert env.unwrapped.kl_coef == 0.05


def test_a_policy_starts_from_a_copy_of_the_environments_model(saved):
    for kl_coef in (0, 0.1):
        env = make(language_model=saved["language_model"], kl_coef=kl_coef)
        policy = env.unwrapped.policy_language_model()
        text = torch.tensor([[5, 6, 7]])
        with torch.no_grad():
            assert torch.equal(policy.model(input_ids=text).logits, LANGUAGE_MODEL.model(input_ids=text).logits)
        with torch.no_grad():
            policy.model.lm_head.weight.zero_()
        env.reset(options={"prompt": "the film"})
        *_, info = env.step(GOOD)
        if kl_coef:
            assert info["ref_log_prob"] == pytest.approx(reference_log_probs(ids("the film"), [GOOD])[0], abs=1e-5)


# --- specifications


def test_a_spec_of_plain_values_survives_json_and_makes_the_same_environment(saved):
    rows = [{"prompt": prompt, "answer": i} for i, prompt in enumerate(PROMPTS)]
    env = make(language_model=saved["language_model"], reward=saved["reward"], prompts=rows, stop=["!", "?"])
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.spec.kwargs == env.spec.kwargs
    for copy_of in (env, again):
        copy_of.reset(seed=4)
    for mine, other in zip(play(env, [GOOD, FILM, EOS]), play(again, [GOOD, FILM, EOS]), strict=True):
        np.testing.assert_equal(mine, other)


def test_the_default_spec_is_plain(saved):
    assert gym.spec("TextGen-v0").to_json()


@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "wrapped"])
def test_models_in_a_spec_are_shared_and_not_copied(wrap):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    reward, prompts = FunctionReward(text_score), as_prompt_source(PROMPTS)
    kwargs = {"language_model": model, "tokenizer": tokenizer, "reward": reward, "prompts": prompts}
    env = make(**kwargs)
    if wrap:
        env = gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(env, 5))
    for spec in (env.spec, copy.deepcopy(env.spec), gym.make(env.spec).spec):
        again = gym.make(spec).unwrapped
        assert isinstance(again, TextGenEnv)
        for name, value in kwargs.items():
            assert getattr(again.options, name) is value, name
        assert again._process.language_model.held.model is model


def test_gymnasium_wrappers_work_around_it():
    env = gym.wrappers.RecordEpisodeStatistics(make())
    env.reset(options={"prompt": "story"})
    steps = play(env, [GOOD, FILM, EOS])
    assert steps[-1][-1]["episode"]["l"] == 3
    assert steps[-1][-1]["episode"]["r"] == pytest.approx(sum(step[1] for step in steps))


# --- options


def test_an_unknown_option_is_an_error_with_a_suggestion():
    with pytest.raises(
        TypeError, match="TextGen-v0 got an unexpected keyword argument 'max_new_token'; did you mean max_new_tokens"
    ):
        make(max_new_token=3)
    with pytest.raises(TypeError, match="argument 'zzz'; the options are language_model, .*render_mode"):
        make(zzz=3)


NAN, INF = float("nan"), float("inf")
WRONG = [
    ("reward_every", 0, ValueError),
    ("reward_every", -1, ValueError),
    ("reward_every", 1.5, TypeError),
    ("reward_every", "END", TypeError),
    ("reward_every", True, TypeError),
    ("kl_coef", -0.1, ValueError),
    ("kl_coef", NAN, ValueError),
    ("kl_coef", INF, ValueError),
    ("kl_coef", "0.1", TypeError),
    ("kl_coef", None, TypeError),
    ("kl_estimator", "k4", ValueError),
    ("kl_estimator", 1, ValueError),
    ("max_new_tokens", 0, ValueError),
    ("max_new_tokens", 2.0, TypeError),
    ("max_new_tokens", None, TypeError),
    ("min_new_tokens", -1, ValueError),
    ("min_new_tokens", 9, ValueError),
    ("max_prompt_tokens", 0, ValueError),
    ("max_prompt_tokens", "5", TypeError),
    ("prompt_overflow", "ignore", ValueError),
    ("stop", "", ValueError),
    ("stop", ["!", ""], ValueError),
    ("stop", ["!", 3], ValueError),
    ("stop", 3, TypeError),
    ("missing_eos_penalty", -1.0, ValueError),
    ("missing_eos_penalty", NAN, ValueError),
    ("temperature", 0.0, ValueError),
    ("temperature", -1.0, ValueError),
    ("temperature", INF, ValueError),
    ("temperature", True, TypeError),
    ("action_masking", 1, TypeError),
    ("action_masking", None, TypeError),
    ("top_k", -1, ValueError),
    ("top_k", 1.5, TypeError),
    ("top_k", 5, ValueError),  # needs action_masking
    ("top_p", 0.0, ValueError),
    ("top_p", 1.1, ValueError),
    ("top_p", 0.9, ValueError),  # needs action_masking
    ("seed", -1, ValueError),
    ("seed", "1", TypeError),
    ("render_mode", "video", ValueError),
    ("device", "gpu", ValueError),
    ("device", "cuda:99", ValueError),
    ("dtype", "int8", ValueError),
    ("dtype", "float33", ValueError),
    ("language_model", 3, TypeError),
    ("language_model", "./nothing", FileNotFoundError),
    ("tokenizer", 3, TypeError),
    ("reward", 3, TypeError),
    ("reward", "./nothing", FileNotFoundError),
]


@pytest.mark.parametrize("kl_coef", [0.05, 0])
@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_a_wrong_option_is_an_error_that_names_it_and_its_value(name, value, error, kl_coef):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*render_mode.*")  # gymnasium's own complaint comes first
        with pytest.raises(error) as raised:
            make(**{"kl_coef": kl_coef, name: value})
    text = str(raised.value)
    assert name.split("_")[0] in text
    assert re.search(re.escape(repr(value).strip("'./")), text)


def test_autoreset_belongs_to_vector_environments():
    with pytest.raises(TypeError, match="autoreset_mode is an option of vector environments"):
        make(autoreset_mode="SameStep")


# --- actions


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (-1, r"=-1 is not a token id: expected 0 to 63"),
        (V, r"=64 is not a token id: expected 0 to 63"),
        (1.0, "must be one token id, a whole number"),
        (True, "must be one token id, a whole number"),
        ("5", "must be one token id, a whole number"),
        (None, "must be one token id, a whole number"),
        (np.array([5]), "must be one token id, a whole number"),
        ([5, 6], "must be one token id, a whole number"),
    ],
)
def test_wrong_actions_are_errors_that_change_nothing(action, message):
    env = make().unwrapped
    before, _ = env.reset(options={"prompt": "story"})
    with pytest.raises(ValueError, match=message):
        env.step(action)
    after = env.step(np.int32(GOOD))[0]
    assert after["input_ids"][:2].tolist() == [*ids("story"), GOOD]
    assert before["attention_mask"].sum() + 1 == after["attention_mask"].sum()


def test_every_token_id_is_tolerated():
    env = make(min_new_tokens=1, max_new_tokens=100, max_prompt_tokens=12)
    env.reset(options={"prompt": "story"})
    for step in play(env, [token for token in range(V) if token != EOS]):
        assert np.isfinite(step[1])


def test_stepping_at_the_wrong_time_is_an_error():
    env = make().unwrapped
    with pytest.raises(gym.error.ResetNeeded, match="step before reset"):
        env.step(GOOD)
    env.reset()
    play(env, [EOS])
    with pytest.raises(gym.error.ResetNeeded, match="has ended"):
        env.step(GOOD)
    env.reset()
    env.close()
    for call in (lambda: env.step(GOOD), env.reset):
        with pytest.raises(gym.error.ClosedEnvironmentError, match="make the environment anew"):
            call()
    env.close()


def test_masks_belong_to_masking_and_to_a_state():
    with pytest.raises(ValueError, match="action_masking=True"):
        make().unwrapped.action_masks()
    env = make(action_masking=True).unwrapped
    with pytest.raises(gym.error.ResetNeeded, match="action_masks before reset"):
        env.action_masks()
    _, info = env.reset()
    assert info["action_mask"].dtype == np.int8
    assert env.action_masks().dtype == bool
    np.testing.assert_array_equal(env.action_masks(), info["action_mask"])
    assert env.action_space.sample(mask=info["action_mask"]) in np.flatnonzero(info["action_mask"])


# --- rewards that fail, wait, and read columns


def raising(prompts, completions, **_):
    raise ZeroDivisionError("no words")


WRONG_REWARDS = {
    "raises": (raising, "'raising', row 0 .*raised ZeroDivisionError: no words"),
    "too many": (lambda prompts, **_: [0.0] * (len(prompts) + 1), "returned 2 scores for 1 completions"),
    "nan": (lambda prompts, **_: [NAN] * len(prompts), "row 0 .*returned float nan; expected one finite number"),
    "infinite": (lambda prompts, **_: np.full(len(prompts), INF), "returned float inf"),
    "text": (lambda prompts, **_: ["good"] * len(prompts), "returned str 'good'"),
    "no list": (lambda prompts, **_: "good", "returned str 'good', not a list"),
    "nothing": (lambda prompts, **_: None, "returned NoneType None, not a list"),
    "unknown column": (lambda prompts, answer, **_: [0.0] * len(prompts), "needs 'answer'"),
}


@pytest.mark.parametrize(("reward", "message"), WRONG_REWARDS.values(), ids=WRONG_REWARDS)
@pytest.mark.parametrize("reward_every", [1, "end"])
def test_a_reward_that_goes_wrong_is_a_reward_error(reward, message, reward_every):
    env = make(reward=reward, reward_every=reward_every)
    if reward_every == "end":
        env.reset()
    with pytest.raises(RewardError, match=message):
        env.reset() if reward_every == 1 else env.step(EOS)


def test_none_counts_as_zero():
    env = make(reward=lambda completions, **_: [None if len(c) < 6 else 2.0 for c in completions], kl_coef=0)
    env.reset(options={"prompt": "the film"})
    assert [step[1] for step in play(env, [GOOD, FILM, EOS])] == [0.0, 2.0, 0.0]


def test_a_reward_that_recovers_after_an_error_can_be_used_again():
    broken = [False]

    def moody(completions, **_):
        if broken[0]:
            raise OSError("the judge is out")
        return [float(len(c)) for c in completions]

    env = make(reward=moody, kl_coef=0)
    env.reset(options={"prompt": "the film"})
    broken[0] = True
    with pytest.raises(RewardError, match="the judge is out"):
        env.step(EOS)
    broken[0] = False
    env.reset(options={"prompt": "the film"})
    assert [step[1] for step in play(env, [GOOD, FILM, EOS])] == [5.0, 5.0, 0.0]


def test_asynchronous_rewards_are_waited_for():
    async def slow(prompts, completions, **_):
        await asyncio.sleep(0.001)
        return text_score(prompts, completions)

    paid = []
    for reward in (slow, text_score):
        env = make(reward=reward)
        env.reset(options={"prompt": "the film"})
        paid.append([step[1] for step in play(env, [GOOD, FILM, EOS])])
    assert paid[0] == paid[1]


def test_a_reward_sees_prompts_completions_token_ids_and_columns():
    seen = []

    def reward(prompts, completions, completion_ids, answer, **rest):
        seen.append((prompts, completions, completion_ids, answer, sorted(rest)))
        return [0.0] * len(prompts)

    env = make(prompts=[{"prompt": "the film", "answer": ("was", 2), "source": "x"}], reward=reward)
    env.reset()
    play(env, [GOOD, FILM, EOS])
    assert seen == [
        (["the film"], [""], [[]], [("was", 2)], ["source"]),
        (["the film"], [" good"], [[GOOD]], [("was", 2)], ["source"]),
        (["the film"], [" good film"], [[GOOD, FILM]], [("was", 2)], ["source"]),
        (["the film"], [" good film"], [[GOOD, FILM, EOS]], [("was", 2)], ["source"]),
    ]


@pytest.fixture
def samples(monkeypatch):
    """The batches of texts that an environment calibrates on, as they come."""
    batches = []

    def complete_and_note(*args, **kwargs):
        texts = complete_texts(*args, **kwargs)
        batches.append(texts.batch(np.arange(len(texts.lengths))))
        return texts

    monkeypatch.setattr("textgym.envs.calibration.complete_texts", complete_and_note)
    return batches


def test_normalized_rewards_are_calibrated_on_texts_of_the_reference_model(samples):
    reward: Reward = REWARD_MODEL.normalized()
    env = make(reward=3 * reward, reward_every="end", kl_coef=0, temperature=1.5)
    assert reward.needs_calibration
    env.reset(seed=0, options={"prompt": "the film"})
    assert not reward.needs_calibration
    assert reward.std != pytest.approx(1, abs=0.05), "normalising does nothing here"
    scores = np.concatenate([reward.potentials(batch) for batch in samples])
    assert len(scores) >= 200
    assert (scores.mean(), scores.std()) == pytest.approx((0, 1), abs=1e-5)

    # On texts that it has not seen, too.
    rows = list(as_prompt_source(PROMPTS)) * 100
    fresh = reward.potentials(completed(LANGUAGE_MODEL, rows, max_new_tokens=8, temperature=1.5))
    assert abs(fresh.mean()) < 0.2
    assert fresh.std() == pytest.approx(1, abs=0.15)

    steps = play(env, [GOOD, FILM, EOS])
    expected = 3 * (phi("causal", ids("the film"), [GOOD, FILM, EOS]) - reward.mean) / reward.std
    assert sum(step[1] for step in steps) == pytest.approx(expected, abs=1e-4)


def test_calibration_texts_are_such_as_the_environment_allows(samples):
    make(reward=REWARD_MODEL.normalized(), temperature=4.0, action_masking=True, min_new_tokens=3).reset()
    completions = [completion for batch in samples for completion in batch.completion_ids]
    assert not {token for completion in completions for token in completion} & {PAD, BOS, UNK}
    assert {len(completion) for completion in completions} == {4, 5, 6, 7, 8}  # the last token may end it

    samples.clear()
    make(reward=REWARD_MODEL.normalized(), temperature=1e-4).reset()
    for batch in samples:
        starts = [row[:n].tolist() for row, n in zip(batch.input_ids, batch.prompt_lengths, strict=True)]
        assert batch.completion_ids == complete(LANGUAGE_MODEL, starts, 8, deterministic=True)


def test_calibrating_is_reproducible_and_touches_no_random_state():
    numbers = []
    for _ in range(2):
        reward = REWARD_MODEL.normalized()
        env = make(reward=reward)
        state = torch.get_rng_state()
        _, info = env.reset(seed=3)
        assert torch.equal(state, torch.get_rng_state())
        numbers.append((reward.mean, reward.std, info["prompt"]))
    assert numbers[0] == numbers[1]
    assert numbers[0][2] == make().reset(seed=3)[1]["prompt"]


def test_a_reward_model_with_another_tokenizer_reads_the_text():
    other = tiny_tokenizer()
    other.add_tokens(["<other>"])
    model = tiny_causal_reward_model()
    model.resize_token_embeddings(65)
    reading, stepping = CausalRewardModel(model, other), CausalRewardModel(model, tiny_tokenizer())
    paid = []
    for reward in (reading, stepping):
        env = make(reward=reward, kl_coef=0)
        env.reset(options={"prompt": "the film"})
        paid.append([step[1] for step in play(env, [*ids("was very good ."), EOS])])
    np.testing.assert_allclose(paid[0], paid[1], atol=1e-5)


def test_the_docstring_lists_every_option_with_its_default():
    import dataclasses

    from textgym.envs import TextGenOptions

    documented = set(re.findall(r"``(\w+)``", " ".join(re.findall(r"^ *\| (``.*?) \|", TextGenEnv.__doc__, re.M))))
    options = {field.name: field.default for field in dataclasses.fields(TextGenOptions)}
    assert set(options) <= documented
    for name in ("reward_every", "kl_coef", "kl_estimator", "max_new_tokens", "prompt_overflow", "temperature"):
        default = f'"{options[name]}"' if isinstance(options[name], str) else options[name]
        assert f"| ``{name}`` | ``{default}`` |" in TextGenEnv.__doc__


@pytest.mark.parametrize("part", ["language model", "reward", "prompts"])
def test_the_embedded_parts_are_the_defaults(part):
    options = dict(DEFAULTS)
    del options["max_prompt_tokens"]
    if part != "reward":
        del options["language_model"], options["prompts"]
    if part == "prompts":
        options["kl_coef"] = 0
    if part == "reward":
        del options["reward"]
    env = gym.make("TextGen-v0", **options)
    env.reset(seed=0)
    *_, info = env.step(int(env.action_space.sample()))
    assert np.isfinite(info["reward_model"])
    if part == "language model":
        assert info["kl"] > 0
    if part == "prompts":
        from textgym import embedded

        assert env.reset()[1]["prompt"] in embedded.load_prompts("train")


def test_with_nothing_given_an_episode_pays_what_the_embedded_reward_model_says():
    from textgym import embedded

    env = gym.make("TextGen-v0", max_new_tokens=6)
    _, start = env.reset(seed=0)
    assert start["prompt"] in embedded.load_prompts("train")
    rng = np.random.default_rng(0)
    steps = play(env, rng.integers(10, env.action_space.n, 6).tolist())
    info = steps[-1][-1]
    paid = sum(step[1] + 0.05 * step[-1]["kl"] for step in steps)
    reward = CausalRewardModel.from_pretrained(embedded.REWARD_MODEL)
    tokenizer = env.unwrapped.tokenizer
    texts = env.unwrapped._rows._episodes.texts
    prompt = texts.ids[0, : texts.prompt_lengths[0]].tolist()
    assert prompt == LanguageModel.encode(env.unwrapped._process.language_model.held, start["prompt"])
    model = reward.model
    scores = []
    for n in (len(prompt), len(prompt) + 6):
        text = texts.ids[0, :n].tolist()
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([text])).last_hidden_state
            scores.append(float(torch.tanh(model.score(hidden[0, -1]))))
    assert info["finish_reason"] == "length"
    assert -1 < info["score"] < 1
    assert info["score"] == pytest.approx(scores[1], abs=1e-5)
    assert paid == pytest.approx(scores[1] - scores[0], abs=1e-5)
    assert tokenizer.decode([GOOD]) != TOKENIZER.decode([GOOD])


def test_the_test_prompts_can_be_chosen():
    from textgym import embedded

    env = gym.make("TextGen-v0", prompts="test", kl_coef=0)
    assert env.reset(seed=0)[1]["prompt"] in embedded.load_prompts("test")


def test_a_dataset_may_give_prompts_and_columns():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "the film", "answer": 5.0}, {"prompt": "a plot", "answer": 7.0}])
    env = make(prompts=rows, reward=lambda answer, **_: answer, reward_every="end", kl_coef=0)
    for _ in range(5):
        _, info = env.reset()
        _, reward, *_ = env.step(EOS)
        assert reward == {"the film": 5.0, "a plot": 7.0}[info["prompt"]]


def test_no_file_of_the_environment_names_a_path_of_this_machine():
    home = str(Path.home())
    for env in (make(), make(kl_coef=0)):
        assert home not in str(env.spec.kwargs)
