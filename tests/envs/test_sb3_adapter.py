"""The environment as a Stable-Baselines3 VecEnv: what stock algorithms, wrappers and evaluation see."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecMonitor, VecNormalize
from text_envs import LANGUAGE_MODEL, REWARDS, ids, make, make_vec, random_actions, reference_log_probs
from tiny_models import EOS, VOCABULARY

from textgym.envs.sb3 import TextGenVecEnv, as_vec_env, deferrable

V = len(VOCABULARY)
GOOD, FILM = ids("good film")
OPTIONS = {"reward": REWARDS["composed"], "missing_eos_penalty": 0.2}


def adapter(n: int = 3, **options) -> TextGenVecEnv:
    return TextGenVecEnv(make_vec(n, **{**OPTIONS, **options}))


def of_single(n: int = 3, **options) -> DummyVecEnv:
    """What SB3 makes of single environments."""
    return DummyVecEnv([lambda: Monitor(make(**{**OPTIONS, **options})) for _ in range(n)])


def vec_monitor(env: TextGenVecEnv) -> VecMonitor:
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        return VecMonitor(env)


@pytest.mark.parametrize("options", [{}, {"action_masking": True, "min_new_tokens": 2}, {"stop": "d f", "kl_coef": 0}])
def test_it_behaves_as_single_environments_in_sb3s_own_vec_env(options):
    ours, theirs = adapter(**options), of_single(**options)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    for env in (ours, theirs):
        env.seed(5)
    compare_rows(ours.reset(), theirs.reset())
    np.testing.assert_equal(ours.reset_infos, theirs.reset_infos)
    rng, finished = np.random.default_rng(0), 0
    for _ in range(24):
        actions, _ = random_actions(rng, ours.text_env)
        (observation, rewards, dones, infos), expected = ours.step(actions), theirs.step(actions)
        compare_rows(observation, expected[0])
        np.testing.assert_allclose(rewards, expected[1], atol=1e-5)
        assert rewards.dtype == expected[1].dtype
        np.testing.assert_array_equal(dones, expected[2])
        np.testing.assert_equal(ours.reset_infos, theirs.reset_infos)
        for row in range(3):
            compare_infos(infos[row], expected[3][row])
        finished += dones.sum()
    assert finished > 4


def compare_rows(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(got) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])
        assert got[name].dtype == expected[name].dtype


def compare_infos(got: dict, expected: dict) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        if name == "episode":
            assert set(got[name]) == {"r", "l", "t"}
            assert got[name]["r"] == pytest.approx(value["r"], abs=2e-5)
            assert got[name]["l"] == value["l"]
            assert 0 < got[name]["t"] < 3600
        elif name == "terminal_observation":
            compare_rows(got[name], value)
        elif isinstance(value, float):
            assert got[name] == pytest.approx(value, abs=1e-5)
        else:
            np.testing.assert_equal(got[name], value)
            assert type(got[name]) is type(value)


def test_log_probs_may_come_with_the_actions():
    env = adapter(2)
    env.seed(0)
    observation = env.reset()
    prompt = observation["input_ids"][1][: observation["prompt_length"][1, 0]].tolist()
    env.step_async(np.array([GOOD, FILM]), [-1.0, -2.5])
    *_, infos = env.step_wait()
    assert infos[1]["kl"] == pytest.approx(-2.5 - reference_log_probs(prompt, [FILM])[0], abs=1e-5)
    *_, infos = env.step(np.array([GOOD, FILM]))  # holds for one step
    assert infos[1]["kl"] == pytest.approx(-infos[1]["ref_log_prob"])


def test_seeds_hold_for_one_reset():
    env = adapter(4)
    runs = []
    for _ in range(2):
        env.seed(3)
        runs.append([env.reset()["input_ids"] for _ in range(4)])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not (np.array(runs[0][0]) == np.array(runs[0][1:])).all()


def test_reset_options_reach_the_environment():
    env = adapter(2)
    env.set_options({"prompt": "fresh music"})
    env.reset()
    assert [info["prompt"] for info in env.reset_infos] == ["fresh music"] * 2
    env.set_options([{"prompt": "fresh music"}, {"prompt": "we"}])
    env.reset()
    assert [info["prompt"] for info in env.reset_infos] == ["fresh music", "we"]


def test_attributes_and_methods_are_answered_for_each_row():
    env = adapter(3, action_masking=True, min_new_tokens=2)
    env.reset()
    assert env.get_attr("kl_coef") == [0.05] * 3
    assert env.get_attr("max_new_tokens", indices=[0, 2]) == [8, 8]
    assert env.get_attr("render_mode") == [None] * 3
    env.set_attr("kl_coef", 0.7)
    assert env.text_env.kl_coef == 0.7
    with pytest.raises(ValueError, match="kl_coef belongs to all rows together"):
        env.set_attr("kl_coef", 0.1, indices=0)
    masks = env.env_method("action_masks")
    np.testing.assert_array_equal(np.stack(masks), env.text_env.action_masks())
    env.step(np.array([GOOD, EOS, FILM]))
    (mask,) = env.env_method("action_masks", indices=[1])
    np.testing.assert_array_equal(mask, env.text_env.action_masks()[1])
    assert env.env_method("report_log_probs", [-1.0] * 3) == [None] * 3
    with pytest.raises(AttributeError):
        env.get_attr("no_such_thing")
    assert not env.has_attr("no_such_thing")


def test_pictures_of_all_rows():
    env = adapter(3, render_mode="rgb_array")
    env.reset()
    assert [image.ndim for image in env.get_images()] == [3, 3, 3]
    assert env.render().shape[0] >= env.get_images()[0].shape[0]


def test_only_text_environments_that_reset_in_the_same_step_fit():
    with pytest.raises(ValueError, match="is not a TextGenVectorEnv"):
        TextGenVecEnv(gym.make_vec("CartPole-v1", num_envs=2))
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED):
        with pytest.raises(ValueError, match="reset in the same step; leave autoreset_mode at its default"):
            TextGenVecEnv(make_vec(2, autoreset_mode=mode))


# --- what users pass to an agent


def test_a_vec_env_is_taken_as_it_is():
    for env in (adapter(), of_single(), vec_monitor(adapter())):
        assert as_vec_env(env) is env


def test_vector_environments_are_adapted_with_their_wrappers():
    bare = make_vec(2)
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(make_vec(2))
    for env in (bare, wrapped):
        vec_env = as_vec_env(env)
        assert isinstance(vec_env, TextGenVecEnv)
        assert vec_env.env is env


class OnlyIds(gym.vector.VectorWrapper):
    """Lets agents see the token ids as one array, as a wrapper of a user's own would."""

    def __init__(self, env: gym.vector.VectorEnv) -> None:
        super().__init__(env)
        self.single_observation_space = env.single_observation_space["input_ids"]
        self.observation_space = env.observation_space["input_ids"]

    def reset(self, **arguments):
        observation, infos = self.env.reset(**arguments)
        return observation["input_ids"], infos

    def step(self, actions):
        observation, rewards, terminated, truncated, infos = self.env.step(actions)
        for row in np.flatnonzero(infos.get("_final_obs", [])):
            infos["final_obs"][row] = infos["final_obs"][row]["input_ids"]
        return observation["input_ids"], rewards, terminated, truncated, infos


def test_episodes_are_counted_behind_wrappers_that_change_observations():
    bare, wrapped = TextGenVecEnv(make_vec(2, **OPTIONS)), TextGenVecEnv(OnlyIds(make_vec(2, **OPTIONS)))
    for env in (bare, wrapped):
        env.seed(0)
        env.reset()
    ends = 0
    for token in [GOOD, FILM, EOS, GOOD, FILM] * 3:
        expected, infos = (env.step(np.array([token, FILM]))[3] for env in (bare, wrapped))
        for mine, other in zip(infos, expected, strict=True):
            assert ("episode" in mine) is ("episode" in other)
            if "episode" in mine:
                ends += 1
                assert mine["episode"]["l"] == other["episode"]["l"]
                assert mine["episode"]["r"] == pytest.approx(other["episode"]["r"])
                assert wrapped.observation_space.contains(mine["terminal_observation"])
    assert ends == 4
    PPO("MlpPolicy", wrapped, n_steps=8, batch_size=8, n_epochs=1, device="cpu").learn(16)


def test_wrappers_that_stable_baselines3_can_not_read_are_refused():
    env = TextGenVecEnv(gym.wrappers.vector.DictInfoToList(make_vec(2)))
    with pytest.raises(TypeError, match="gives infos as a list .* leave out the wrapper"):
        env.reset()


def test_single_environments_get_one_monitor(capsys):
    for env, wraps in [(make(), True), (Monitor(make()), False), (gym.wrappers.TimeLimit(Monitor(make()), 5), False)]:
        vec_env = as_vec_env(env, verbose=1)
        assert isinstance(vec_env, DummyVecEnv)
        assert vec_env.env_is_wrapped(Monitor) == [True]
        assert isinstance(vec_env.envs[0], Monitor) is (wraps or isinstance(env, Monitor))
        if not wraps:
            assert vec_env.envs[0] is env
    assert not as_vec_env(make(), monitor_wrapper=False).env_is_wrapped(Monitor)[0]
    assert "Monitor" in capsys.readouterr().out


def test_an_id_makes_the_embedded_environment_with_one_row():
    vec_env = as_vec_env("TextGen-v0")
    assert isinstance(vec_env, TextGenVecEnv)
    assert vec_env.num_envs == 1
    vec_env.close()


@pytest.mark.parametrize("env", [3, None, "not an id", LANGUAGE_MODEL])
def test_anything_else_is_an_error(env):
    with pytest.raises((TypeError, gym.error.Error)):
        as_vec_env(env)


def test_scoring_may_be_deferred_only_where_nobody_looks_at_the_rewards():
    bare = make_vec(2)
    assert deferrable(TextGenVecEnv(bare)) is bare
    assert deferrable(vec_monitor(adapter())) is None
    assert deferrable(VecNormalize(adapter(), norm_obs=False)) is None
    assert deferrable(TextGenVecEnv(gym.wrappers.vector.RecordEpisodeStatistics(make_vec(2)))) is None
    assert deferrable(of_single()) is None


def test_while_scoring_is_deferred_no_return_is_reported():
    env = adapter(2)
    env.text_env.begin_rollout()
    env.reset()
    _, rewards, dones, infos = env.step(np.array([EOS, GOOD]))
    assert (dones.tolist(), rewards.tolist()) == ([True, False], [0.0, 0.0])
    assert "episode" not in infos[0]
    assert infos[0]["finish_reason"] == "eos"
    assert [e["finish_reason"] for e in env.text_env.scores().episodes] == ["eos"]


# --- stock Stable-Baselines3


def small_ppo(env, **options) -> PPO:
    return PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu", **options)


@pytest.mark.parametrize("make_env", [adapter, of_single, make], ids=["adapter", "single ones", "one"])
def test_stock_ppo_trains(make_env):
    model = small_ppo(make_env())
    before = {name: p.clone() for name, p in model.policy.state_dict().items()}
    model.learn(48)
    assert model.num_timesteps == 48
    assert len(model.ep_info_buffer) > 0
    assert any(not (before[name] == p).all() for name, p in model.policy.state_dict().items())


def test_callbacks_of_stable_baselines3_work(tmp_path):
    callback = EvalCallback(adapter(2), eval_freq=8, n_eval_episodes=3, log_path=str(tmp_path), verbose=0)
    small_ppo(adapter(3)).learn(24, callback=callback)
    assert np.load(tmp_path / "evaluations.npz")["results"].shape == (1, 3)


class Scripted:
    """A policy that writes what the observation says, whoever asks."""

    def predict(self, observation, state=None, episode_start=None, deterministic=True):
        seen = observation["input_ids"].sum(1) + 31 * observation["attention_mask"].sum(1)
        return np.where(seen % 9 == 0, EOS, 4 + seen % (V - 4)), state


def test_evaluate_policy_gives_what_it_gives_on_monitored_single_environments():
    results = []
    for env in (adapter(2), vec_monitor(adapter(2)), of_single(2)):
        env.seed(1)
        results.append(evaluate_policy(Scripted(), env, n_eval_episodes=8, return_episode_rewards=True))
    (returns, lengths), monitored, single = results
    assert lengths == monitored[1] == single[1]
    np.testing.assert_allclose(returns, single[0], atol=2e-5)
    np.testing.assert_allclose(returns, monitored[0], atol=2e-5)
    assert np.std(returns) > 0.1
    assert len(set(lengths)) > 1


def test_rewards_can_be_normalized():
    env = VecNormalize(adapter(3), norm_obs=False, gamma=1.0)
    env.seed(0)
    env.reset()
    rng = np.random.default_rng(0)
    rewards, original = [], []
    for _ in range(30):
        rewards.append(env.step(random_actions(rng, env.venv.text_env)[0])[1])
        original.append(env.get_original_reward())
    expected = np.clip(original[-1] / np.sqrt(env.ret_rms.var + 1e-8), -10, 10)
    np.testing.assert_allclose(rewards[-1], expected, rtol=1e-5)
    assert not np.allclose(rewards, original)


def test_wrappers_that_stack_observations_work():
    env = VecFrameStack(adapter(2), n_stack=2)
    observation = env.reset()
    assert observation["input_ids"].shape == (2, 2 * 20)
    for _ in range(9):
        env.step(np.array([GOOD, FILM]))


@pytest.mark.parametrize("make_env", [adapter, of_single], ids=["adapter", "single ones"])
def test_maskable_ppo_takes_allowed_actions_only(make_env):
    sb3_contrib = pytest.importorskip("sb3_contrib")
    env = make_env(3, action_masking=True, top_k=7, min_new_tokens=3)
    model = sb3_contrib.MaskablePPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    taken = []

    def note(local, _):
        taken.append(local["action_masks"][np.arange(3), np.asarray(local["actions"]).reshape(3)])
        return True

    model.learn(48, callback=note)
    assert len(taken) == 16
    assert np.all(taken)
