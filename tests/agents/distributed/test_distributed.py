"""Training in two processes on the CPU: what they exchange, what they write, how they stop and go on.

The processes are real ones. Starting them, which imports everything for each, takes longer than what they do. So there
is one ``accelerate launch``, of ``textgym train ppo``, one of whose processes is killed; everything else is done,
with replicated and with sharded weights, by this file as a script that imports once and forks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from places import ROOT, TESTS
from safetensors.torch import load_file, save_file
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from tiny_agents import tiny_language_model, tiny_ppo, tiny_vector_env
from torch.distributed.tensor import DTensor

from textgym.agents import GRPO, PPO, RLOO, LearningRewards, StopOnKL
from textgym.agents.buffers.episode_buffer import EpisodeBuffer
from textgym.agents.callbacks.adaptive_kl import AdaptiveKLCallback
from textgym.agents.callbacks.checkpoints import TrainingCheckpoints, checkpoints_in, read_checkpoint, resume
from textgym.agents.common.normalisation import whitened
from textgym.agents.distributed.processes import Processes, _wants_fsdp
from textgym.agents.distributed.sharded_weights import ShardedWeights
from textgym.agents.distributed.shared_prompts import DividePrompts, SharedPrompts
from textgym.agents.runs import Run, RunConfig, RunFolder, training
from textgym.rewards import AdversarialReward, NoveltyReward

TRAIN = ["-m", "textgym.agents.cli", "train", "ppo"]  # what accelerate launches
ROWS = {0: [0, 1, 2], 1: [3]}  # of the four rows of one process; three and one, so that a mean of means would be wrong
SETTINGS: dict[str, dict[str, Any]] = {
    "minibatch": {"normalize_advantage": True},
    "rollout": {"normalize_advantage": "rollout", "ent_coef": 0.01, "clip_range_vf": 0.2},
    # Losses that are means over something else than tokens.
    "grpo": {"agent": GRPO, "loss_type": "grpo"},
    "dr_grpo": {"agent": GRPO, "loss_type": "dr_grpo"},
    "rloo": {"agent": RLOO},
}
PROMPTS = [f"the film is {word} and" for word in "good great fine warm funny clever moving fresh bad dull".split()]
PROMPTS += [f"we {prompt}" for prompt in PROMPTS]
PROMPTS += [f"they {prompt}" for prompt in PROMPTS]  # 40


RUN: dict[str, Any] = {
    "rows": 2, "max_new_tokens": 6, "timesteps": 240, "eval_every": 96, "eval_prompts": 4, "samples": 2,
    "checkpoint_every": 48, "kl_target": 2.0, "threads": 1, "device": "cpu", "process_timeout": 60.0,
    "reward_every": "end",
}  # fmt: skip


def run_options(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run on a tiny model, whose checkpoints are small."""
    names = {"model": str(folder / "tiny"), "prompts": str(folder / "prompts.txt")}
    return {**RUN, **names, "reward": f"{folder / 'mine.py'}:score", **changes}


def launched(config: str, *arguments: str | Path) -> list[str]:
    """The arguments of ``accelerate launch`` for a script in two processes."""
    path = ROOT / "examples" / "accelerate" / config
    return ["--config_file", str(path), "--num_processes", "2", *map(str, arguments)]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS)}
    command = (sys.executable, *map(str, command))
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=ROOT)


def environment_of(config: str) -> dict[str, str]:
    """What ``accelerate launch`` tells the processes of a script through their environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(launched(config, "script.py"))
    return prepare_multi_gpu_env(_validate_launch_command(arguments)[0])


class ReportKL(BaseCallback):
    """Makes the KL of all episodes of this process a number."""

    def __init__(self, kl: float) -> None:
        super().__init__()
        self.kl = kl

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        for episode in self.model.finished_episodes:
            episode["kl"] = self.kl


class ValuesInOneProcess(BaseCallback):
    """Calls the policy's modules once more in the second process than in the first, as unequal rows may."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        if self.rank == 1:
            self.model.policy.predict_values(self.model._last_obs)


class Plain(torch.optim.Optimizer):
    """An optimizer that isn't torch's."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})


# What the two processes do with the rollout of one


def agent(num_envs: int, setting: str) -> PPO:
    arguments = {"n_epochs": 1, "max_grad_norm": 1e9, **SETTINGS[setting]}
    if "agent" in arguments:
        in_groups = {"group_size": 2, "episodes": 4, "seed": 0, "device": "cpu", **arguments}
        model = in_groups.pop("agent")("LanguageModelPolicy", tiny_vector_env(num_envs), **in_groups)
    else:
        model = tiny_ppo(tiny_vector_env(num_envs), batch_size=12 * num_envs, **arguments)
    with torch.no_grad():  # else the value loss would not reach the transformer
        model.policy.value_net.weight.fill_(0.05)
    model.set_logger(Logger(None, []))
    return model


def gradients_of_an_update(model: PPO) -> dict[str, torch.Tensor]:
    names = [name for name, _ in model.policy.named_parameters()]
    model.train()
    gradients = {}
    for name, parameter in zip(names, model.policy.optimizer.param_groups[0]["params"], strict=True):
        gradient = parameter.grad
        if gradient is None:  # the value head, of agents without a critic
            continue
        gradients[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return gradients


def part_of(whole: dict[str, Any], rows: list[int], model: PPO) -> EpisodeBuffer:
    """The rows of one process of a buffer that :func:`stored` took down."""
    buffer = EpisodeBuffer(12, model.observation_space, model.action_space, "cpu", n_envs=len(rows))
    for name, array in whole["arrays"].items():
        setattr(buffer, name, array[:, rows].copy())
    for name, places in whole["places"].items():
        setattr(buffer, name, {(rows.index(row), step): value for (row, step), value in places if row in rows})
    buffer.pos, buffer.full = 12, True
    return buffer


def stored(buffer: EpisodeBuffer) -> dict[str, Any]:
    """What a buffer holds of each step and row, and of each place where a segment begins."""
    shape = (buffer.buffer_size, buffer.n_envs)
    arrays = {name: v.copy() for name, v in vars(buffer).items() if isinstance(v, np.ndarray) and v.shape[:2] == shape}
    places = {name: list(v.items()) for name, v in vars(buffer).items() if name in ("_prefixes", "_prompt_lengths")}
    return {"arrays": arrays, "places": places}


def digest(model: PPO) -> str:
    weights = model.policy.state_dict().values()
    return hashlib.sha256(b"".join(tensor.clone().numpy().tobytes() for tensor in weights)).hexdigest()


@contextlib.contextmanager
def replicated_weights() -> Iterator[None]:
    """Agents that are made in this context don't shard."""
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    yield
    os.environ["ACCELERATE_USE_FSDP"] = "true"


def fork_workers(folder: Path) -> int:
    """Run :func:`worker` in two processes, as if launched with ``fsdp2.yaml``; 0 if all went well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(environment_of("fsdp2.yaml"))
    os.environ.update({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=worker, args=(folder, rank)) for rank in range(2)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    return int(any(each.exitcode != 0 for each in workers))


def worker(folder: Path, rank: int) -> None:
    """What each of the two processes does; the first one writes what came of it."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank)})
    training.plot_runs = lambda folders, output: None  # which takes longer than such a run
    processes = Processes.join(timeout=60, cpu=True)
    assert processes.shard  # says the configuration
    rollout = torch.load(folder / "rollout.pt", weights_only=False)
    with replicated_weights():
        found = exchanged(processes, rollout, folder)
        assert Run("ppo", RunConfig(**run_options(folder)), folder / "whole").train()
    save_gradients(processes, rollout, folder, "sharded")
    found["sharded"] = sharded(processes, folder)
    if processes.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    with replicated_weights(), contextlib.suppress(SystemExit):
        from textgym.agents.cli.main import app

        # The command as a user starts it; it ends the connection.
        app(["train", "--resume", str(folder / "killed"), "--no-progress"])


def save_gradients(processes: Processes, rollout: dict[str, Any], folder: Path, kind: str) -> None:
    for setting in SETTINGS:
        model = agent(len(ROWS[processes.rank]), setting)
        model.rollout_buffer = part_of(rollout, ROWS[processes.rank], model)
        gradients = gradients_of_an_update(model)
        if processes.is_main:
            save_file(gradients, folder / f"{setting}-{kind}.safetensors")


def exchanged(processes: Processes, rollout: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What replicated weights, rewards and prompts are like."""
    save_gradients(processes, rollout, folder, "replicated")
    mine = rollout["arrays"]["rewards"][:, ROWS[processes.rank]]
    whitened_rewards = processes.gather(whitened(mine, processes))
    if processes.is_main:
        np.save(folder / "whitened.npy", np.concatenate(whitened_rewards, axis=1))

    # Several updates, with minibatches of uneven size and an early stop.
    prompts = SharedPrompts(PROMPTS, seed=3)
    env = tiny_vector_env(2 + processes.rank, prompts=prompts)
    kl = AdaptiveKLCallback(target=1.0, horizon=20)
    options = {"target_kl": 0.02, "learning_rate": 3e-3, "batch_size": 7, "policy_kwargs": {"value_head": "mlp"}}
    model = tiny_ppo(env, n_epochs=3, **options)
    weights = model.policy.state_dict()
    first = processes.gather(hashlib.sha256(weights["value_net.0.weight"].numpy().tobytes()).hexdigest())
    model.learn(300, callback=[DividePrompts(prompts), kl])
    ends = processes.gather(
        {
            "weights": digest(model),
            "kl_coef": env.kl_coef,
            "timesteps": model.num_timesteps,
            "updates": model._n_updates,
            "episodes": [episode["r"] for episode in model.ep_info_buffer or []],
        }
    )
    actions = processes.gather(model.rollout_buffer.actions[:, 0].tolist())

    # Rewards that learn, from three rows and from two.
    reward = AdversarialReward(["a joy to watch", "a dull mess"]) + NoveltyReward()
    model = tiny_ppo(tiny_vector_env(2 + processes.rank, reward=reward), n_steps=12)
    model.learn(120, callback=LearningRewards())
    texts = {"prompts": ["the film is"] * 3, "completions": [" a joy", " dull dull", " of the"]}
    learned = processes.gather({"scores": reward(**texts), "before": score_before_learning(texts)})

    # One process draws more than twice as many prompts as the other.
    shared = SharedPrompts(PROMPTS, seed=1)
    rng, rounds = np.random.default_rng(), []
    for _ in range(6):
        drawn = [shared.sample(rng).prompt for _ in range(3 + 4 * processes.rank)]
        rounds.append([prompt for part in processes.gather(drawn) for prompt in part])
        shared.divide()
    found = {"ends": ends, "first": first, "rounds": rounds, "actions": actions, "learned": learned}
    return {**found, **stopped_together(processes, folder)}


def stopped_together(processes: Processes, folder: Path) -> dict[str, Any]:
    """Where trainings end that a limit or patience ends before their tokens are used up."""
    # The KL is above the limit in one process alone, of two rows and of three; over both it is between.
    limits = {}
    for limit in (2.0, 4.9):
        stop = StopOnKL(limit)
        model = tiny_ppo(tiny_vector_env(2 + processes.rank))
        model.learn(240, callback=[ReportKL(1.0 if processes.is_main else 5.0), stop])
        limits[str(limit)] = processes.gather([model.num_timesteps, stop.last_kl])
    (folder / "flat.py").write_text("def score(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n")
    options = {"reward": f"{folder / 'flat.py'}:score", "patience": 2, "eval_every": 24}
    flat = Run("ppo", RunConfig(**run_options(folder, **options)), folder / "flat")
    assert flat.train()
    ended = processes.gather([flat.agent.num_timesteps, flat.recorder.out_of_patience])
    return {"limits": limits, "out_of_patience": ended}


def score_before_learning(texts: dict[str, list[str]]) -> list[float | None]:
    return list((AdversarialReward(["a joy to watch", "a dull mess"]) + NoveltyReward())(**texts))


def sharded(processes: Processes, folder: Path) -> dict[str, Any]:
    """What sharded weights are like in training, in checkpoints and in files."""
    options: dict[str, Any] = {
        "n_epochs": 2, "learning_rate": 3e-3, "batch_size": 7, "target_kl": 0.5,
        "policy_kwargs": {"gradient_checkpointing": True, "value_head": "mlp"},
    }  # fmt: skip

    def trained(on_from: Path | None) -> PPO:
        callback = TrainingCheckpoints(folder / "sharded-checkpoints", every=60, keep=None)
        model = tiny_ppo(tiny_vector_env(2 + processes.rank), **options)
        if on_from is not None:
            resume(model, on_from, callback)
        model.learn(180 - model.num_timesteps, callback=callback, reset_num_timesteps=on_from is None)
        return model

    unequal = tiny_ppo(tiny_vector_env(2), **options)
    unequal.learn(48, callback=ValuesInOneProcess(processes.rank))
    model = trained(None)
    resumed = trained(folder / "sharded-checkpoints" / "checkpoint-000000000120")
    parts = [part for group in model.policy.optimizer.param_groups for part in group["params"]]
    moments = [t for state in model.policy.optimizer.state.values() for t in state.values() if t.ndim]
    found: dict[str, Any] = {
        "weights": digest(model),
        "unequal": digest(unequal),
        "resumed": digest(resumed),
        "ratio_first": model.logger.name_to_value["train/ratio_first"],
        "all_bytes": sum(p.numel() * p.element_size() for p in model.policy.parameters()),
        "part_bytes": sum(part.to_local().untyped_storage().nbytes() for part in parts),
        "gradient_bytes": sum(part.grad.to_local().numel() * 4 for part in parts),
        "moment_bytes": sum(t.to_local().untyped_storage().nbytes() for t in moments),
    }
    processes.on_main(lambda: model.save_pretrained(folder / "sharded-model"))
    opened = PPO.from_pretrained(folder / "sharded-model", tiny_vector_env(2), device="cpu")
    found["opened"] = digest(opened)
    opened.learn(24)
    found["learned"] = digest(opened)

    fast = {"timesteps": 48, "eval_every": 24, "rollout_dtype": "bfloat16", "autocast": "bfloat16"}
    assert Run("ppo", RunConfig(**run_options(folder, **fast)), folder / "sharded-run").train()

    _ = next(resumed.policy.parameters()).detach().numpy()
    with pytest.raises(RuntimeError, match=r"is held by a NumPy array: .*detach\(\).clone\(\).numpy\(\)"):
        resumed.processes.begin_update()
    return {name: processes.gather(value) for name, value in found.items()}


class Two(NamedTuple):
    """What two processes made.

    :param folder: of the worker: ``whole``, a run; ``killed``, one whose second process was killed, and then resumed
    :param rollout: of four rows in one process, which they updated with
    :param found: what else the worker wrote
    :param died: what was printed when a process was killed
    :param left: what was in the folder of the killed run's checkpoints then, and whether there was a model
    :param printed: what the worker printed
    """

    folder: Path
    rollout: dict[str, Any]
    found: dict[str, Any]
    died: str
    left: dict[str, Any]
    printed: str


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    model = agent(4, "minibatch")
    train, model.train = model.train, lambda: None  # type: ignore[method-assign]
    model.learn(48)
    model.train = train  # type: ignore[method-assign]
    rollout = stored(model.rollout_buffer)
    torch.save(rollout, folder / "rollout.pt")
    (folder / "mine.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    tiny_language_model().save_pretrained(folder / "tiny")
    flags = [
        part for name, value in run_options(folder).items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    killed = RunFolder(folder / "killed")
    arguments = launched("cpu.yaml", *TRAIN, *flags, "--output", killed.path, "--no-progress")
    died = run("-m", "accelerate.commands.accelerate_cli", "launch", *arguments)
    assert died.returncode != 0
    left = {
        "checkpoints": checkpoints_in(killed.checkpoints),
        "states": [read_checkpoint(path) for _, path in checkpoints_in(killed.checkpoints)],
        "names": {path.name for path in killed.checkpoints.iterdir()},
        "model": killed.model.exists(),
    }
    with pytest.raises(ValueError, match="training in 2 processes, and this is one in 1: .*--num_processes 2"):
        Run.resumed(killed.path)
    done = run(__file__, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "found.json").read_text())
    return Two(folder, rollout, found, died.stdout + died.stderr, left, done.stdout)


@pytest.mark.slow
def test_limits_and_patience_end_both_processes_at_the_same_step(two: Two) -> None:
    limits = two.found["limits"]
    (one, kl), (other, other_kl) = limits["2.0"]
    assert one == other < 240
    assert 2.0 < kl == other_kl < 5.0
    assert all(timesteps >= 240 for timesteps, _ in limits["4.9"])
    (one, ended), (other, other_ended) = two.found["out_of_patience"]
    assert one == other < RUN["timesteps"]
    assert ended
    assert other_ended


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradient_of_two_processes_is_that_of_one_with_all_the_rows(two: Two, setting: str, kind: str) -> None:
    model = agent(4, setting)
    model.rollout_buffer = part_of(two.rollout, [0, 1, 2, 3], model)
    alone, together = gradients_of_an_update(model), load_file(two.folder / f"{setting}-{kind}.safetensors")
    assert alone.keys() == together.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, atol=1e-5, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in alone.values()) > 1e-2  # else the tolerance would say nothing


@pytest.mark.slow
def test_rewards_are_whitened_over_all_processes(two: Two) -> None:
    rewards = two.rollout["arrays"]["rewards"]
    np.testing.assert_allclose(np.load(two.folder / "whitened.npy"), whitened(rewards), atol=1e-6)


@pytest.mark.slow
def test_processes_with_rows_of_their_own_keep_the_same_weights(two: Two) -> None:
    found = two.found
    assert found["first"][0] == found["first"][1]
    assert found["ends"][0] == found["ends"][1]  # weights, β, counters and the figures of the episodes
    assert found["ends"][0]["timesteps"] == 300  # of both: 2 + 3 rows
    assert found["ends"][0]["kl_coef"] != 0.1
    assert found["actions"][0] != found["actions"][1]


@pytest.mark.slow
def test_rewards_learn_from_the_episodes_of_both_processes(two: Two) -> None:
    one, other = two.found["learned"]
    assert one["scores"] == other["scores"] != one["before"]


@pytest.mark.slow
def test_no_prompt_is_seen_twice_before_all_are(two: Two) -> None:
    rounds = two.found["rounds"]  # of ten prompts each, three by one process and seven by the other
    first_three = [prompt for part in rounds[:3] for prompt in part]
    assert len(set(first_three)) == 30
    drawn = Counter(prompt for part in rounds[:5] for prompt in part)
    assert set(drawn) == set(PROMPTS)
    assert max(drawn.values()) == 2


# Sharded weights


@pytest.mark.slow
def test_each_of_two_processes_holds_half_of_a_sharded_training(two: Two) -> None:
    found = two.found["sharded"]
    whole = found["all_bytes"][0]
    for kind, copies in (("part_bytes", 1), ("gradient_bytes", 1), ("moment_bytes", 2)):
        # FSDP pads what has an odd number of rows, such as a bias of one.
        assert found[kind] == pytest.approx([copies * whole / 2] * 2, rel=0.01)


@pytest.mark.slow
def test_sharded_training_keeps_one_set_of_weights_that_act_and_learn_alike(two: Two) -> None:
    found = two.found["sharded"]
    assert found["weights"][0] == found["weights"][1]
    assert max(found["ratio_first"]) < 1e-4


@pytest.mark.slow
def test_sharded_processes_that_act_unequally_learn_together(two: Two) -> None:
    assert len(set(two.found["sharded"]["unequal"])) == 1


@pytest.mark.slow
def test_a_sharded_training_resumes_exactly(two: Two) -> None:
    assert two.found["sharded"]["resumed"] == two.found["sharded"]["weights"]


@pytest.mark.slow
def test_a_sharded_agent_is_saved_whole_and_learns_on(two: Two) -> None:
    found = two.found["sharded"]
    assert found["opened"] == found["weights"]
    assert found["learned"][0] == found["learned"][1] != found["weights"][0]
    alone = PPO.from_pretrained(two.folder / "sharded-model", device="cpu")
    assert digest(alone) == found["weights"][0]


@pytest.mark.slow
def test_a_sharded_run_evaluates_in_one_process_and_writes_a_model(two: Two) -> None:
    run = RunFolder(two.folder / "sharded-run")
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [r["time/total_timesteps"] for r in rows if "eval/score_mean" in r] == [0, 24, 48]
    assert (run.model / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": True}, "lora=.* with sharded weights .*; use a configuration without FSDP"),
        ({}, "compile=True with sharded weights .*: .* give a rollout_dtype"),
        ({"optimizer_class": Plain}, "optimizer_class=Plain with sharded weights .*: only torch's own"),
    ],
)
def test_what_cannot_be_sharded_is_refused(options: dict[str, Any], message: str) -> None:
    policy = tiny_ppo(policy_kwargs=options).policy
    policy.compile_model = not options  # building such a policy would begin to compile
    with pytest.raises(ValueError, match=message):
        ShardedWeights(policy, torch.device("cpu"))


def test_fsdp_in_its_first_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version: 1 .* must be 2"):
        _wants_fsdp()


# Prompts and seeds


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

died = pathlib.Path(__file__).with_name("died")
calls = 0


def score(prompts, completions, **columns):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 7 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(text.split()) / 10 for text in completions]
"""


@pytest.mark.slow
def test_one_process_writes_and_counts_the_tokens_of_both(two: Two) -> None:
    whole = RunFolder(two.folder / "whole")
    rows = [json.loads(line) for line in whole.metrics.read_text().splitlines()]
    assert [r["time/total_timesteps"] for r in rows if "train/loss" in r] == list(range(24, 241, 24))
    assert [r["time/total_timesteps"] for r in rows if "eval/score_mean" in r] == [0, 96, 192, 240]
    assert len(whole.samples.read_text().splitlines()) == 4 * 2
    assert len(list(whole.tensorboard.iterdir())) == 1
    facts = json.loads(whole.run.read_text())
    assert (facts["status"], facts["processes"]) == ("finished", 2)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_leaves_whole_checkpoints(two: Two) -> None:
    assert "lost another one" in two.died
    assert f"--resume {two.folder / 'killed'}" in two.died.replace("\n", " ")
    assert two.left["checkpoints"]
    for state in two.left["states"]:
        assert len(state["other_processes"]) == 1
    assert two.left["names"] == {path.name for _, path in two.left["checkpoints"]}
    assert not two.left["model"]


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_like_one_that_was_not(two: Two) -> None:
    whole, killed = RunFolder(two.folder / "whole"), RunFolder(two.folder / "killed")
    assert "from checkpoint-" in two.printed
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
    sys.exit(fork_workers(Path(sys.argv[1])))
