"""TextGen-v0 as a single environment: interface, specifications, actions, defaults."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from text_envs import (
    DEFAULTS,
    LANGUAGE_MODEL,
    MASKING,
    PROMPTS,
    REWARD_MODEL,
    TOKENIZER,
    ids,
    make,
    play,
    reference_log_probs,
    text_score,
)
from tiny_models import BOS, EOS, PAD, UNK, VOCABULARY, tiny_causal_reward_model, tiny_model, tiny_tokenizer

from textgym.envs import TextGenEnv
from textgym.language_model import LanguageModel
from textgym.prompts.opening import as_prompt_source
from textgym.rewards import FunctionReward
from textgym.rewards.models.causal import CausalRewardModel

V = len(VOCABULARY)
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


# --- defaults


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
