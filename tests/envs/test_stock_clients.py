"""Other people's clients on our environments: Stable-Baselines3, sb3-contrib, Gymnasium's wrappers, RL Baselines3 Zoo.

tests/envs/test_sb3_adapter.py has more of Stable-Baselines3's VecEnv side.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3 as sb3
import yaml
from gymnasium.wrappers import RecordEpisodeStatistics, RecordVideo, TimeLimit
from places import TESTS
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecMonitor, VecNormalize
from text_envs import DEFAULTS, REWARDS, ids, make, make_vec, play, text_score
from tiny_models import tiny_model, tiny_tokenizer

from textgym.agents import PPO
from textgym.agents.cli import zoo
from textgym.envs.sb3 import as_vec_env
from textgym.hyperparams import ALGORITHMS, hyperparams_file

sb3_contrib = pytest.importorskip("sb3_contrib")

OPTIONS = {"reward": REWARDS["function"], "max_new_tokens": 4}


def rows(**options: Any) -> VecEnv:
    return as_vec_env(make_vec(2, **{**OPTIONS, **options}))


def singles(**options: Any) -> VecEnv:
    return make_vec_env(lambda: make(**{**OPTIONS, **options}), n_envs=2, seed=0)


ENVS = pytest.mark.parametrize("make_env", [rows, singles], ids=["one vector environment", "single ones"])


# --- Stable-Baselines3 and sb3-contrib


ON_POLICY = {"n_steps": 8, "seed": 0, "device": "cpu"}
ALGORITHMS_AND_ARGUMENTS: dict[str, tuple[type[BaseAlgorithm], str, dict[str, Any]]] = {
    "PPO": (sb3.PPO, "MultiInputPolicy", {**ON_POLICY, "batch_size": 8, "n_epochs": 1}),
    "A2C": (sb3.A2C, "MultiInputPolicy", ON_POLICY),
    "DQN": (
        sb3.DQN,
        "MultiInputPolicy",
        {"buffer_size": 64, "learning_starts": 8, "batch_size": 8, "train_freq": 4, "seed": 0, "device": "cpu"},
    ),
    "RecurrentPPO": (
        sb3_contrib.RecurrentPPO,
        "MultiInputLstmPolicy",
        {**ON_POLICY, "batch_size": 8, "n_epochs": 1, "policy_kwargs": {"lstm_hidden_size": 8}},
    ),
    "MaskablePPO": (sb3_contrib.MaskablePPO, "MultiInputPolicy", {**ON_POLICY, "batch_size": 8, "n_epochs": 1}),
}


@ENVS
@pytest.mark.parametrize("name", ALGORITHMS_AND_ARGUMENTS)
def test_stock_algorithms_learn_predict_save_and_load(name, make_env, tmp_path):
    algorithm, policy, arguments = ALGORITHMS_AND_ARGUMENTS[name]
    options = {"action_masking": True, "min_new_tokens": 2} if name == "MaskablePPO" else {}
    env = make_env(**options)
    model = algorithm(policy, env, **arguments)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(32)
    assert model.num_timesteps == 32
    assert any(not before[key].equal(value) for key, value in model.policy.state_dict().items())
    assert {episode["l"] <= 4 for episode in model.ep_info_buffer} == {True}

    observation = env.reset()
    actions, _ = model.predict(observation, deterministic=True)
    assert actions.shape == (2,)
    model.save(tmp_path / "model.zip")
    again = algorithm.load(tmp_path / "model.zip", env=make_env(**options), device="cpu")
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], actions)
    again.learn(16)
    returns, lengths = evaluate_policy(again, make_env(**options), n_eval_episodes=3, return_episode_rewards=True)
    assert len(returns) == 3
    assert max(lengths) <= 4


@ENVS
def test_sb3_contribs_helpers_find_the_masks(make_env):
    from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    env = make_env(action_masking=True, min_new_tokens=4)
    assert is_masking_supported(env)
    env.reset()
    masks = get_action_masks(env)
    model = sb3_contrib.MaskablePPO("MultiInputPolicy", env, n_steps=8, batch_size=8, seed=0, device="cpu")
    actions, _ = model.predict(env.reset(), action_masks=masks)
    assert masks[[0, 1], actions].all()
    # End-of-sequence is masked before the fourth token, so no episode is shorter.
    _, lengths = evaluate_masked(model, env, n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [4] * 4


@pytest.mark.slow
def test_processes_of_their_own_give_what_one_process_gives(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    options = {**DEFAULTS, **OPTIONS, "reward": text_score, "language_model": str(tmp_path), "device": "cpu"}
    envs = [
        make_vec_env("TextGen-v0", n_envs=2, seed=3, env_kwargs=options, vec_env_cls=kind)
        for kind in (SubprocVecEnv, DummyVecEnv)
    ]
    try:
        actions = np.array(ids("good film"))
        for observations in zip(*(env.reset().items() for env in envs), strict=True):
            np.testing.assert_array_equal(observations[0][1], observations[1][1])
        for _ in range(5):
            (_, rewards, dones, infos), expected = (env.step(actions) for env in envs)
            np.testing.assert_allclose(rewards, expected[1], atol=1e-5)
            np.testing.assert_array_equal(dones, expected[2])
            assert [info.get("completion") for info in infos] == [info.get("completion") for info in expected[3]]
    finally:
        for env in envs:
            env.close()


def test_stock_ppo_learns_through_monitor_and_normalized_rewards(tmp_path):
    with pytest.warns(UserWarning, match="already wrapped with a `Monitor`"):
        env: VecEnv = VecMonitor(rows(), str(tmp_path / "log"))
    env = VecNormalize(env, norm_obs=False, gamma=1.0)
    model = sb3.PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu").learn(32)
    assert env.ret_rms.var != 1.0
    env.save(str(tmp_path / "statistics.pkl"))
    again = VecNormalize.load(str(tmp_path / "statistics.pkl"), rows())
    assert again.ret_rms.var == env.ret_rms.var
    env.close()
    episodes = load_results(str(tmp_path))
    assert len(episodes) == len(model.ep_info_buffer)
    assert episodes["l"].max() <= 4


# --- Gymnasium's wrappers


def test_a_time_limit_cuts_an_episode_and_statistics_count_it():
    env = RecordEpisodeStatistics(TimeLimit(make(**OPTIONS), 2))
    env.reset(options={"prompt": "story"})
    steps = play(env, ids("good film and this"))
    assert len(steps) == 2
    assert steps[-1][2:4] == (False, True)
    assert steps[-1][4]["episode"]["l"] == 2
    assert steps[-1][4]["episode"]["r"] == pytest.approx(sum(step[1] for step in steps))
    limited = gym.make("TextGen-v0", max_episode_steps=3, **{**DEFAULTS, **OPTIONS})
    limited.reset()
    assert len(play(limited, ids("good film and this"))) == 3


@pytest.mark.parametrize("env_id", ["TextGen-v0", "TextWrite-v0"])
def test_videos_have_a_frame_for_every_state(env_id, tmp_path):
    pytest.importorskip("moviepy")
    imageio = pytest.importorskip("imageio_ffmpeg")
    env = gym.make(env_id, render_mode="rgb_array", **{**DEFAULTS, **OPTIONS})
    env = RecordVideo(env, str(tmp_path / "videos"), episode_trigger=lambda episode: True, disable_logger=True)
    for _ in range(2):
        env.reset(options={"prompt": "story"})
        height, width = env.render().shape[:2]
        for piece in (" good", " film", " and", " this"):
            env.step(piece if env_id == "TextWrite-v0" else ids(piece)[0])
    env.close()
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert len(videos) == 2
    for video in videos:
        frames, _ = imageio.count_frames_and_secs(str(video))
        assert frames == 5
        size = next(imageio.read_frames(str(video)))["size"]
        assert size == (width - width % 2, height - height % 2)


# --- RL Baselines3 Zoo

ZOO_ALGORITHMS = ["ppo", "textgym_ppo"]


def zoo_command(algorithm: str, script: str, *arguments: str) -> list[str]:
    """How a user starts a script of the zoo: our agents with our command, stock ones with the zoo's own."""
    common = ["--algo", algorithm, "--env", "TextGen-v0", "--seed", "1", "--device", "cpu", *arguments]
    if algorithm == "ppo":
        return [f"rl_zoo3.{script}", "--gym-packages", "textgym", *common]
    return ["textgym.agents.cli.zoo", script, *common]


@pytest.fixture(scope="module")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the zoo has trained and shown an agent of each kind on a tiny model."""
    folder = tmp_path_factory.mktemp("zoo")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    # A tiny model, and a reward of a stock client's kind.
    options = [
        "--env-kwargs",
        f"language_model:{str(folder / 'model')!r}",
        "reward:__import__('text_envs').text_score",
        "prompts:['the film', 'story']",
        "max_new_tokens:4",
        "max_prompt_tokens:8",
    ]
    small = ["-params", "n_envs:2", "n_steps:8", "batch_size:8", "n_epochs:1"]
    checkpoints = ["-n", "32", "--eval-freq", "16", "--eval-episodes", "2", "--save-freq", "16"]
    commands = []
    for algorithm in ZOO_ALGORITHMS:
        settings = ["--conf-file", str(hyperparams_file("ppo"))] if algorithm == "ppo" else []
        commands += [
            zoo_command(algorithm, "train", *settings, *checkpoints, *small, *options),
            zoo_command(algorithm, "enjoy", "-f", "logs", "-n", "12", "--load-best", "--stochastic"),
        ]
    described = [{"folder": str(folder), "module": module, "arguments": rest} for module, *rest in commands]
    (folder / "commands.json").write_text(json.dumps(described))
    environment = {**os.environ, "PYTHONWARNINGS": "default", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, str(TESTS / "zoo_commands.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return folder


# Not importorskip: importing the zoo puts its own TimeLimit into Gymnasium.
@pytest.mark.skipif(importlib.util.find_spec("rl_zoo3") is None, reason="needs rl_zoo3")
@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ZOO_ALGORITHMS)
def test_the_zoo_trains_evaluates_saves_and_enjoys(algorithm, zoo_folder):
    ours = algorithm == "textgym_ppo"
    folder = zoo_folder / "logs" / algorithm / "TextGen-v0_1"
    for name in ("best_model.zip", "TextGen-v0.zip", "rl_model_16_steps.zip", "evaluations.npz"):
        assert (folder / name).is_file(), name
    assert np.load(folder / "evaluations.npz")["results"].shape == (2, 2)
    assert load_results(str(folder))["l"].between(1, 4).all()  # the Monitor's files, for the zoo's plots
    saved = yaml.unsafe_load((folder / "TextGen-v0" / "config.yml").read_text())
    assert dict(saved)["gamma"] == yaml.safe_load(hyperparams_file(algorithm).read_text())["TextGen-v0"]["gamma"]
    assert (folder / "TextGen-v0" / "vecnormalize.pkl").is_file() is not ours
    model = PPO.load(folder / "TextGen-v0.zip", trust=True) if ours else sb3.PPO.load(folder / "TextGen-v0.zip")
    assert model.num_timesteps == 32
    shown = (zoo_folder / f"{2 * ZOO_ALGORITHMS.index(algorithm) + 1}.txt").read_text()
    assert "Mean reward" in shown
    assert "nats" in shown  # the text, drawn in the terminal at each step


def test_the_zoos_rows_are_its_single_environments(tmp_path):
    def make_env(**options: Any) -> gym.Env:
        return make(**{**OPTIONS, **options})

    envs = []
    for name, kind in (("ours", zoo.zoo_vec_env), ("theirs", DummyVecEnv)):
        arguments = {"n_envs": 3, "seed": 5, "monitor_dir": str(tmp_path / name)}
        envs.append(make_vec_env(make_env, vec_env_cls=kind, env_kwargs={"reward": text_score}, **arguments))
    assert [type(env) for env in envs] == [zoo.ZooRows, DummyVecEnv]
    observations = [env.reset() for env in envs]
    rng = np.random.default_rng(0)
    for _ in range(20):
        for name in observations[0]:
            np.testing.assert_array_equal(observations[0][name], observations[1][name])
        actions = rng.integers(2, 20, size=3)
        steps = [env.step(actions) for env in envs]
        np.testing.assert_allclose(steps[0][1], steps[1][1], atol=1e-5)
        np.testing.assert_array_equal(steps[0][2], steps[1][2])
        observations = [step[0] for step in steps]
    episodes = []
    for env, name in zip(envs, ("ours", "theirs"), strict=True):
        env.close()
        rows = load_results(str(tmp_path / name))
        episodes.append(sorted(zip(rows["l"], rows["r"].round(3), strict=True)))
    assert len(episodes[0]) > 10
    assert [length for length, _ in episodes[0]] == [length for length, _ in episodes[1]]
    np.testing.assert_allclose(episodes[0], episodes[1], atol=2e-3)


@pytest.mark.parametrize(
    ("wrapper", "monitor"),
    [(lambda env: TimeLimit(env, 2), {}), (None, {"info_keywords": ("finish_reason",)})],
    ids=["a wrapper", "infos for the monitor"],
)
def test_the_zoo_keeps_single_environments_where_somebody_looks_at_each(wrapper, monitor):
    env = make_vec_env(
        lambda: make(**OPTIONS), n_envs=2, wrapper_class=wrapper, monitor_kwargs=monitor, vec_env_cls=zoo.zoo_vec_env
    )
    assert type(env) is DummyVecEnv
    assert env.num_envs == 2
    other = make_vec_env("CartPole-v1", n_envs=2, vec_env_cls=zoo.zoo_vec_env)
    assert type(other) is DummyVecEnv


def test_the_zoo_trains_with_the_shipped_hyperparameters_unless_told_otherwise():
    ours = ["--conf-file", str(hyperparams_file("textgym_ppo"))]
    stock = ["--conf-file", str(hyperparams_file("ppo"))]
    assert zoo.with_hyperparams(["--algo", "textgym_ppo", "--env", "My-v0"])[:2] == ours
    assert zoo.with_hyperparams(["--algo=ppo", "--env=TextGen-v0"])[:2] == stock
    assert zoo.with_hyperparams(["--env", "TextGen-v0", "-conf", "mine.yml"])[-1] == "mine.yml"  # the last one counts
    for arguments in (["--env", "CartPole-v1"], ["--algo", "a2c", "--env", "TextGen-v0"]):
        assert zoo.with_hyperparams(arguments) == arguments


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_shipped_hyperparameters_are_arguments_of_their_algorithm(algorithm):
    agent = {"ppo": sb3.PPO, **zoo.AGENTS}[algorithm]
    settings = yaml.safe_load(hyperparams_file(algorithm).read_text(encoding="utf-8"))
    assert settings["default"] == settings["TextGen-v0"]
    known = set(inspect.signature(agent).parameters) | {"n_envs", "n_timesteps", "normalize"}
    assert set(settings["TextGen-v0"]) <= known
    assert settings["TextGen-v0"]["policy"] in agent.policy_aliases
    rollout = settings["TextGen-v0"]["n_envs"] * settings["TextGen-v0"]["n_steps"]
    assert rollout % settings["TextGen-v0"]["batch_size"] == 0


def test_an_algorithm_without_hyperparameters_is_an_error():
    with pytest.raises(ValueError, match="algorithm='sac' has no hyperparameter file; there are ppo, textgym_ppo"):
        hyperparams_file("sac")


def test_a_command_prints_where_the_hyperparameters_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "ppo"])
    runpy.run_module("textgym.hyperparams", run_name="__main__")
    assert capsys.readouterr().out.strip() == str(hyperparams_file("ppo"))


def test_what_the_zoo_samples_are_arguments_of_the_agent():
    optuna = pytest.importorskip("optuna")
    values = {"learning_rate": 1e-4, "n_steps": 16, "n_epochs": 2, "gae_lambda": 0.9, "clip_range": 0.2}
    trial = optuna.trial.FixedTrial({**values, "vf_coef": 0.1, "ent_coef": 1e-5})
    sampled = zoo.sample_hyperparameters(trial, 64, 8, {})
    assert sampled["n_steps"] == 16
    model = PPO("LanguageModelPolicy", make_vec(2, **OPTIONS), batch_size=8, device="cpu", **sampled)
    assert model.learn(32).num_timesteps == 32
