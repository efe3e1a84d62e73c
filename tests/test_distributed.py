"""Training in two processes on the CPU: what they exchange, what they write, how they stop and go on.

The processes are real ones: this file launches itself, and ``examples/train_ppo.py``, with ``accelerate launch``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common.logger import Logger
from tiny_agents import tiny_ppo, tiny_vector_env

from textgym.agents import PPO
from textgym.agents.callbacks import AdaptiveKLCallback
from textgym.agents.checkpoints import checkpoints_in, read_checkpoint
from textgym.agents.distributed import DividePrompts, Processes, SharedPrompts
from textgym.agents.episode_buffer import EpisodeBuffer
from textgym.agents.on_policy import whitened
from textgym.agents.runs import Run, RunConfig, RunFolder

ROOT = Path(__file__).resolve().parents[1]
ROWS = {0: [0, 1, 2], 1: [3]}  # of the four rows of one process; three and one, so that a mean of means would be wrong
SETTINGS: dict[str, dict[str, Any]] = {
    "minibatch": {"normalize_advantage": True},
    "rollout": {"normalize_advantage": "rollout", "ent_coef": 0.01, "clip_range_vf": 0.2},
}
PROMPTS = [f"the film is {word} and" for word in "good great fine warm funny clever moving fresh bad dull".split()]
PROMPTS += [f"we {prompt}" for prompt in PROMPTS]
PROMPTS += [f"they {prompt}" for prompt in PROMPTS]  # 40


RUN: dict[str, Any] = {
    "rows": 2, "max_new_tokens": 6, "timesteps": 240, "eval_every": 96, "eval_prompts": 4, "samples": 2,
    "checkpoint_every": 48, "kl_target": 2.0, "threads": 1, "device": "cpu", "process_timeout": 60.0,
    "reward_every": "end",
}  # fmt: skip


def launch(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Start a script in two processes, as a user does."""
    config = ROOT / "examples" / "accelerate" / "cpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# What the two processes do with the rollout of one


def agent(num_envs: int, setting: str) -> PPO:
    arguments = {"batch_size": 12 * num_envs, "n_epochs": 1, "max_grad_norm": 1e9, **SETTINGS[setting]}
    model = tiny_ppo(tiny_vector_env(num_envs), **arguments)
    with torch.no_grad():  # else the value loss would not reach the transformer
        model.policy.value_net.weight.fill_(0.05)
    model.set_logger(Logger(None, []))
    return model


def gradients_of_an_update(model: PPO) -> dict[str, torch.Tensor]:
    model.train()
    return {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}


def part_of(whole: dict[str, Any], rows: list[int], model: PPO) -> EpisodeBuffer:
    """The rows of one process of a buffer that :func:`stored` took down."""
    buffer = EpisodeBuffer(12, model.observation_space, model.action_space, "cpu", n_envs=len(rows))
    for name, array in whole["arrays"].items():
        setattr(buffer, name, array[:, rows].copy())
    buffer._prefixes = {(rows.index(row), step): prefix for (row, step), prefix in whole["prefixes"] if row in rows}
    buffer.pos, buffer.full = 12, True
    return buffer


def stored(buffer: EpisodeBuffer) -> dict[str, Any]:
    names = ("actions", "rewards", "returns", "episode_starts", "values", "log_probs", "advantages")
    return {
        "arrays": {name: getattr(buffer, name).copy() for name in names},
        "prefixes": list(buffer._prefixes.items()),
    }


def worker(folder: Path) -> None:
    """What each of the two processes does; the first one writes what came of it."""
    processes = Processes.join(timeout=60)
    rollout = torch.load(folder / "rollout.pt", weights_only=False)
    for setting in SETTINGS:
        model = agent(len(ROWS[processes.rank]), setting)
        model.rollout_buffer = part_of(rollout, ROWS[processes.rank], model)
        gradients = gradients_of_an_update(model)
        if processes.is_main:
            save_file(gradients, folder / f"{setting}.safetensors")
    mine = rollout["arrays"]["rewards"][:, ROWS[processes.rank]]
    whitened_rewards = processes.gather(whitened(mine, processes))

    # Several updates, with minibatches of uneven size and an early stop.
    prompts = SharedPrompts(PROMPTS, seed=3)
    env = tiny_vector_env(2 + processes.rank, prompts=prompts)
    kl = AdaptiveKLCallback(target=1.0, horizon=20)
    options = {"target_kl": 0.02, "learning_rate": 3e-3, "batch_size": 7, "policy_kwargs": {"value_head": "mlp"}}
    model = tiny_ppo(env, n_epochs=3, **options)
    weights = model.policy.state_dict()
    first = processes.gather(hashlib.sha256(weights["value_net.0.weight"].numpy().tobytes()).hexdigest())
    model.learn(300, callback=[DividePrompts(prompts), kl])
    digest = hashlib.sha256()
    for tensor in model.policy.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    ends = processes.gather(
        {
            "weights": digest.hexdigest(),
            "kl_coef": env.kl_coef,
            "timesteps": model.num_timesteps,
            "updates": model._n_updates,
            "episodes": [episode["r"] for episode in model.ep_info_buffer or []],
        }
    )
    actions = processes.gather(model.rollout_buffer.actions[:, 0].tolist())

    # One process draws more than twice as many prompts as the other.
    shared = SharedPrompts(PROMPTS, seed=1)
    rng, rounds = np.random.default_rng(), []
    for _ in range(6):
        drawn = [shared.sample(rng).prompt for _ in range(3 + 4 * processes.rank)]
        rounds.append([prompt for part in processes.gather(drawn) for prompt in part])
        shared.divide()
    if processes.is_main:
        found = {"ends": ends, "first": first, "rounds": rounds, "actions": actions}
        (folder / "found.json").write_text(json.dumps(found))
        np.save(folder / "whitened.npy", np.concatenate(whitened_rewards, axis=1))

    assert Run("ppo", RunConfig(**RUN, reward=f"{folder / 'mine.py'}:score"), folder / "whole").train()
    processes.leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder of what two processes made of a rollout of four rows, that rollout, and what else they found."""
    folder = tmp_path_factory.mktemp("two")
    model = agent(4, "minibatch")
    train, model.train = model.train, lambda: None  # type: ignore[method-assign]
    model.learn(48)
    model.train = train  # type: ignore[method-assign]
    rollout = stored(model.rollout_buffer)
    torch.save(rollout, folder / "rollout.pt")
    (folder / "mine.py").write_text(REWARD)
    (folder / "killed").touch()  # so that nobody is
    launch(__file__, folder)
    return folder, rollout, json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradient_of_two_processes_is_that_of_one_with_all_the_rows(two: Any, setting: str) -> None:
    folder, rollout, _ = two
    model = agent(4, setting)
    model.rollout_buffer = part_of(rollout, [0, 1, 2, 3], model)
    alone, together = gradients_of_an_update(model), load_file(folder / f"{setting}.safetensors")
    assert alone.keys() == together.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, atol=1e-5, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in alone.values()) > 1e-2  # else the tolerance would say nothing


@pytest.mark.slow
def test_rewards_are_whitened_over_all_processes(two: Any) -> None:
    folder, rollout, _ = two
    np.testing.assert_allclose(np.load(folder / "whitened.npy"), whitened(rollout["arrays"]["rewards"]), atol=1e-6)


@pytest.mark.slow
def test_processes_with_rows_of_their_own_keep_the_same_weights(two: Any) -> None:
    _, _, found = two
    assert found["first"][0] == found["first"][1]
    assert found["ends"][0] == found["ends"][1]  # weights, β, counters and the figures of the episodes
    assert found["ends"][0]["timesteps"] == 300  # of both: 2 + 3 rows
    assert found["ends"][0]["kl_coef"] != 0.1
    assert found["actions"][0] != found["actions"][1]


@pytest.mark.slow
def test_no_prompt_is_seen_twice_before_all_are(two: Any) -> None:
    rounds = two[2]["rounds"]  # of ten prompts each, three by one process and seven by the other
    first_three = [prompt for part in rounds[:3] for prompt in part]
    assert len(set(first_three)) == 30
    drawn = Counter(prompt for part in rounds[:5] for prompt in part)
    assert set(drawn) == set(PROMPTS)
    assert max(drawn.values()) == 2


def test_one_process_draws_every_prompt_once_before_any_twice() -> None:
    prompts, rng = SharedPrompts(PROMPTS, seed=2), np.random.default_rng()
    drawn = []
    for size in (7, 1, 0, 50, 22):
        drawn += [prompts.sample(rng).prompt for _ in range(size)]
        prompts.divide()
    assert set(Counter(drawn[:40]).values()) == set(Counter(drawn[40:]).values()) == {1}
    assert drawn[:40] != drawn[40:]
    again = SharedPrompts(PROMPTS, seed=2)
    again.load_state_dict(prompts.state_dict())
    assert [again.sample(rng) for _ in range(5)] == [prompts.sample(rng) for _ in range(5)]


def test_prompts_of_a_function_are_not_divided() -> None:
    with pytest.raises(TypeError, match="PromptFunction has no fixed prompts"):
        SharedPrompts(lambda rng: "the film")


def test_seeds_of_processes_differ_and_the_first_keeps_its_own() -> None:
    seeds = [Processes(rank, 4).seed(seed) for rank in range(4) for seed in (0, 1)]
    assert len(set(seeds)) == 8
    assert seeds[:2] == [0, 1]
    assert Processes(1, 2).seed(None) is None


# Runs

REWARD = """
import os, pathlib, signal

killed = pathlib.Path(__file__).with_name("killed")
calls = 0


def score(prompts, completions, **columns):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 7 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(text.split()) / 10 for text in completions]
"""


@pytest.fixture(scope="module")
def runs(two: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder, str]:
    """A run in two processes, one whose second process was killed, and what was printed at that."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "mine.py").write_text(REWARD)
    options = {**RUN, "reward": f"{folder / 'mine.py'}:score"}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    died = launch("examples/train_ppo.py", *flags, "--output", folder / "run", "--no-progress", check=False)
    assert died.returncode != 0
    return RunFolder(two[0] / "whole"), RunFolder(folder / "run"), died.stdout + died.stderr


@pytest.mark.slow
def test_one_process_writes_and_counts_the_tokens_of_both(runs: Any) -> None:
    whole: RunFolder = runs[0]
    rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert [r["time/total_timesteps"] for r in rows if "train/loss" in r] == list(range(24, 241, 24))
    assert [r["time/total_timesteps"] for r in rows if "eval/score_mean" in r] == [0, 96, 192, 240]
    assert len(whole.samples.read_text().splitlines()) == 4 * 2
    assert len(list(whole.tensorboard.iterdir())) == 1
    facts = json.loads(whole.run.read_text())
    assert (facts["status"], facts["processes"]) == ("finished", 2)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_leaves_whole_checkpoints(runs: Any) -> None:
    _, killed, printed = runs
    assert "lost another one" in printed
    assert f"--resume {killed.path}" in printed.replace("\n", " ")
    found = checkpoints_in(killed.checkpoints)
    assert found
    for _, path in found:
        assert len(read_checkpoint(path)["other_processes"]) == 1
    assert {path.name for path in killed.checkpoints.iterdir()} == {path.name for _, path in found}
    assert not killed.model.exists()


@pytest.mark.slow
def test_another_number_of_processes_is_refused(runs: Any) -> None:
    with pytest.raises(ValueError, match="training in 2 processes, and this is one in 1: .*--num_processes 2"):
        Run.resumed(runs[1].path)


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_like_one_that_was_not(runs: Any) -> None:
    whole, killed, _ = runs
    resumed = launch("examples/train_ppo.py", "--resume", killed.path, "--no-progress")
    assert "from checkpoint-" in resumed.stdout
    one, other = (load_file(folder.model / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    clock = ("time/fps", "time/time_elapsed", "time/iterations")
    left, right = (
        [
            {name: value for name, value in json.loads(line).items() if name not in clock}
            for line in folder.metrics.read_text().splitlines()
        ]
        for folder in (whole, killed)
    )
    assert left == right
    states = [read_checkpoint(folder.checkpoints / "checkpoint-000000000240") for folder in (whole, killed)]
    prompts = [dict(state["callbacks"])["DividePrompts"] for state in states]
    assert prompts[0] == prompts[1]
    randoms = [state["other_processes"][0]["random"]["torch"] for state in states]
    assert torch.equal(*randoms)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
