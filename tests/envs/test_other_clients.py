"""What other people's clients count on: Gymnasium's step limits, TorchRL, recorders, success rates, words of errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.logger import KVWriter, Logger
from text_envs import DEFAULTS, LANGUAGE_MODEL, ids, make, make_vec, play, text_score
from tiny_agents import count_liked, tiny_ppo, tiny_vector_env
from tiny_encoder_decoders import tiny_encoder_decoder
from tiny_models import tiny_model, tiny_tokenizer

from textgym.envs import SameInfoKeys, TextActions, TextGenVectorEnv, TextObservations
from textgym.envs.sb3 import as_vec_env
from textgym.language_model import LanguageModel

# --- step limits of Gymnasium


def test_a_step_limit_cuts_rows_as_it_cuts_single_environments():
    options = {**DEFAULTS, "reward_every": 1, "kl_coef": 0.1}
    envs = gym.make_vec(
        "TextGen-v0", num_envs=2, vectorization_mode="vector_entry_point", max_episode_steps=3, **options
    )
    single = gym.make("TextGen-v0", max_episode_steps=3, **options)
    observation, _ = envs.reset(seed=3)
    expected, _ = single.reset(seed=3)
    for token in ids("good film and"):
        for name, value in expected.items():
            np.testing.assert_array_equal(observation[name][0], value)
        observation, rewards, terminated, truncated, infos = envs.step(np.array([token, token]))
        expected, reward, *ends, _ = single.step(token)
        assert rewards[0] == pytest.approx(reward, abs=1e-5)
        assert [terminated[0], truncated[0]] == ends
    assert truncated.tolist() == [True, True]
    assert infos["final_info"]["finish_reason"].tolist() == ["length", "length"]
    assert infos["final_info"]["completion"][0] == " good film and"


@pytest.mark.parametrize("env_id", ["TextGen-v0", "TextWrite-v0"])
def test_ids_registered_with_a_step_limit_work_in_both_forms(env_id):
    entry = gym.registry[env_id]
    gym.register("Limited-v0", entry.entry_point, vector_entry_point=entry.vector_entry_point, max_episode_steps=2)
    try:
        piece = " good" if env_id == "TextWrite-v0" else ids("good")[0]
        single = gym.make("Limited-v0", **DEFAULTS)
        single.reset(seed=0)
        assert [single.step(piece)[3] for _ in range(2)] == [False, True]
        vec = gym.make_vec("Limited-v0", num_envs=2, vectorization_mode="vector_entry_point", **DEFAULTS)
        vec.reset(seed=0)
        pieces: Any = (piece, piece) if env_id == "TextWrite-v0" else np.array([piece, piece])
        assert [vec.step(pieces)[3].tolist() for _ in range(2)] == [[False, False], [True, True]]
    finally:
        del gym.registry["Limited-v0"]


def test_agents_learn_under_a_step_limit():
    envs = tiny_vector_env(2, reward=count_liked, max_episode_steps=3)
    model = tiny_ppo(envs)
    model.learn(24)
    assert {episode["l"] for episode in model.ep_info_buffer} <= {1, 2, 3}


@pytest.mark.parametrize("limit", [0, 2.5, "3", True])
def test_an_impossible_step_limit_is_refused(limit):
    with pytest.raises((ValueError, TypeError), match="max_episode_steps=.* must be a whole number"):
        TextGenVectorEnv(2, max_episode_steps=limit, **DEFAULTS)


# --- TorchRL, where it is installed


def test_torchrl_steps_episodes_of_turns_one_by_one_and_in_a_batch():
    torchrl = pytest.importorskip("torchrl.envs", reason="needs torchrl")
    turns = {"reply": lambda transcripts: [" story"] * len(transcripts), "max_turns": 2, "max_new_tokens": 2}
    options = {**DEFAULTS, "kl_coef": 0.0, **turns}
    env = torchrl.GymEnv("TextGen-v0", **options)
    torchrl.check_env_specs(env)
    steps = env.rollout(12)["next"]
    assert steps["done"].flatten().tolist() == [False] * (len(steps) - 1) + [True]
    assert steps["completion_mask"][-1].sum() == len(steps)  # the replies are not its tokens
    assert steps["attention_mask"][-1].sum() == len(steps) + 2 + steps["prompt_length"][-1, 0]
    envs = gym.make_vec("TextGen-v0", num_envs=3, autoreset_mode=AutoresetMode.DISABLED, **options)
    many = torchrl.GymWrapper(envs).rollout(12, break_when_any_done=False)["next"]
    assert many["done"].sum() >= 3 * 3


# --- TorchRL


def test_an_unknown_option_is_refused_in_pythons_words():
    """TorchRL 0.14 tries frameskip=1 and goes on without it only after an error that says so."""
    for make_it in (make, lambda **options: make_vec(2, **options)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'frameskip'"):
            make_it(frameskip=1)


def test_vector_environments_say_when_rows_begin_anew():
    """TorchRL's GymWrapper reads the attribute."""
    assert make_vec(2).autoreset_mode is AutoresetMode.SAME_STEP
    assert make_vec(2, autoreset_mode="NextStep").autoreset_mode is AutoresetMode.NEXT_STEP


# --- success


class Succeeds(gym.vector.VectorWrapper):
    """Says ``is_success`` at the end of episodes: true in row 0."""

    def step(self, actions: Any) -> Any:
        *step, infos = self.env.step(actions)
        if "final_info" in infos:
            infos["final_info"]["is_success"] = np.arange(self.num_envs) == 0
            infos["final_info"]["_is_success"] = infos["_final_info"].copy()
        return *step, infos


class Kept(KVWriter):
    """Keeps the newest figures that a logger writes."""

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.figures = dict(key_values)


def logged(env: Any) -> dict[str, Any]:
    """What a short training logs."""
    model, kept = tiny_ppo(env, n_steps=8), Kept()
    model.set_logger(Logger(None, [kept]))
    model.learn(16)
    return kept.figures


def test_success_is_logged_where_infos_have_it():
    """Both rows' episodes have at most two tokens, and the window is larger than all of them."""
    figures = logged(as_vec_env(Succeeds(make_vec(2, max_new_tokens=2, reward=count_liked, min_new_tokens=2))))
    assert figures["rollout/success_rate"] == 0.5
    assert "rollout/success_rate" not in logged(tiny_vector_env(2, reward=count_liked))


# --- single environments speak of themselves


def test_a_step_past_the_end_says_to_reset():
    env = make()
    env.reset()
    play(env, [LANGUAGE_MODEL.eos_token_id])
    with pytest.raises(gym.error.ResetNeeded, match=r"the episode has ended \(finish_reason='eos'\): call reset"):
        env.step(3)


@pytest.mark.parametrize("action", [-1, 10**6, 2.0, "good", [3], None])
def test_a_wrong_action_is_named_without_a_row(action):
    env = make()
    env.reset()
    with pytest.raises(ValueError, match="action=") as caught:
        env.step(action)
    assert "row" not in str(caught.value)


@pytest.mark.parametrize("log_prob", [0.5, float("nan"), float("-inf"), [-1.0], "x"])
def test_a_wrong_log_probability_is_named_without_a_row(log_prob):
    env = make()
    env.reset()
    with pytest.raises((ValueError, TypeError), match="^log_prob"):
        env.unwrapped.report_log_prob(log_prob)


# --- recorders


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.0}, {"missing_eos_penalty": 1.0, "action_masking": True}])
def test_infos_can_have_the_same_keys_and_types_at_every_step(options):
    env = SameInfoKeys(make(**options, max_new_tokens=3))
    _, at_reset = env.reset(seed=0)
    infos = [at_reset]
    for _ in range(3):
        infos.append(env.step(ids("good")[0])[4])
    assert {frozenset(info) for info in infos} == {frozenset(at_reset)}
    for name in at_reset:
        assert len({np.asarray(info[name]).dtype.kind for info in infos}) == 1, name
    assert infos[-1]["finish_reason"] == "length"
    assert np.isfinite(infos[-1]["score"])


@pytest.mark.parametrize("wrapper", [SameInfoKeys, TextActions, TextObservations])
def test_wrapped_environments_can_be_made_again_from_their_specifications(wrapper):
    """As those who load recorded data do."""
    specification = wrapper(gym.make("TextGen-v0", kl_coef=0.0, max_new_tokens=2)).spec.to_json()
    again = gym.make(EnvSpec.from_json(specification))
    assert isinstance(again, wrapper)
    assert again.unwrapped.max_new_tokens == 2


def test_environments_of_pieces_have_infos_of_their_own():
    with pytest.raises(TypeError, match="is not a TextGen-v0 environment"):
        SameInfoKeys(gym.make("TextWrite-v0", **DEFAULTS))


def test_statistics_of_gymnasiums_vector_wrapper_count_limited_episodes():
    limited = gym.make_vec(
        "TextGen-v0", num_envs=2, vectorization_mode="vector_entry_point", max_episode_steps=2, **DEFAULTS
    )
    env = RecordEpisodeStatistics(limited)
    env.reset(seed=0)
    for _ in range(2):
        *_, infos = env.step(np.array(ids("good film")))
    lengths = infos["final_info"]["episode"]["l"] if "episode" in infos.get("final_info", {}) else infos["episode"]["l"]
    assert lengths.tolist() == [2, 2]


# --- Stable-Baselines3


def test_the_adapter_answers_as_single_environments_do():
    adapted, single = as_vec_env(make_vec(2)), as_vec_env(make())
    for name in ("action_space", "observation_space"):
        assert adapted.get_attr(name, indices=[0]) == single.get_attr(name)
    adapted.seed(7)
    adapted.reset()
    single.seed(7)
    single.reset()
    assert adapted.get_attr("token_ids", indices=0) == single.get_attr("token_ids")
    assert len(adapted.get_attr("np_random")) == 2
    assert isinstance(adapted.get_attr("np_random", indices=1)[0], np.random.Generator)


def test_rows_of_the_adapter_can_be_told_their_log_probabilities_one_by_one():
    told, given = as_vec_env(make_vec(2, kl_coef=0.5)), as_vec_env(make_vec(2, kl_coef=0.5))
    actions = np.array(ids("good film"))
    for env in (told, given):
        env.seed(0)
        env.reset()
    told.env_method("report_log_prob", -1.5, indices=[0])
    told.env_method("report_log_prob", -0.25, indices=1)
    given.step_async(actions, log_probs=[-1.5, -0.25])
    np.testing.assert_allclose(told.step(actions)[1], given.step_wait()[1])
    np.testing.assert_allclose(told.step(actions)[1], given.step(actions)[1])  # it holds for one step
    with pytest.raises(ValueError, match="log_prob=0.5 is not a log-probability"):
        told.env_method("report_log_prob", 0.5)


def test_reset_options_may_differ_by_row():
    env = as_vec_env(make_vec(3))
    env.set_options([{"prompt": "story"}, {}, {"prompt": "the film"}])
    env.reset()
    prompts = [info["prompt"] for info in env.reset_infos]
    assert prompts[0] == "story"
    assert prompts[1] in DEFAULTS["prompts"]
    assert prompts[2] == "the film"
    env.set_options([{"prompt": "story"}, {"seed": 1}, {}])
    with pytest.raises(ValueError, match="reset options have 'seed'; known is 'prompt'"):
        env.reset()


def test_predict_returns_what_stable_baselines3_returns():
    env = as_vec_env(make_vec(2))
    ours, theirs = tiny_ppo(env), sb3.PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, device="cpu")
    many = env.reset()
    one = {name: value[0] for name, value in many.items()}
    for observation in (one, many):
        mine, stock = ours.predict(observation)[0], theirs.predict(observation)[0]
        assert (type(mine), mine.shape, mine.dtype) == (type(stock), stock.shape, stock.dtype)


# --- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_an_environment_can_be_copied_amid_an_episode_and_goes_on_alike(copied, architecture):
    model = tiny_encoder_decoder() if architecture == "t5" else tiny_model(architecture)
    language_model = LanguageModel(model, tiny_tokenizer())
    env = make(language_model=language_model, reward=text_score, kl_coef=0.3, action_masking=True, top_k=40)
    env.reset(seed=0)
    env.step(ids("good")[0])
    other = copied(env)
    for token in ids("film and"):
        (observation, reward, *_), (expected, wanted, *_) = other.step(token), env.step(token)
        np.testing.assert_array_equal(observation["input_ids"], expected["input_ids"])
        assert reward == pytest.approx(wanted, abs=1e-5)
    assert other.reset()[1]["prompt"] == env.reset()[1]["prompt"]
