"""How long until it is good? CPU seconds of training until a held-out score at a bounded KL, ours beside TRL's.

    python benchmarks/time_to_quality.py                        # everything; hours
    python benchmarks/time_to_quality.py --contenders PPO "TRL PPO" --seeds 1
    python benchmarks/time_to_quality.py --report               # the table and the plot of what has been run

The work is the quickstart's: the embedded model continues openings of film reviews in at most 24 tokens, the embedded
reward model scores them, all in fp32 on one thread. Every contender leaves its weights behind in short intervals, with
the CPU seconds that it had trained for; afterwards the same evaluation judges all of them on held-out prompts. What a
process imports, and what is spent on evaluation, does not count.

Each contender is run with every learning rate in :data:`CONTENDERS` on a seed of its own; the fastest goes on to the
seeds 0, 1, 2. What is done is kept (``--work``), so a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peers import PeerError, command_of
from separate_runs import keep, kept_result, path_of

SEARCH_SEED = 1_000
NEW_TOKENS = 24
ROWS = 64
SCORES = (0.2, 0.3, 0.39)
MOST_KL = 6.0  # nats per completion
LEAST_DISTINCT = 0.75  # of the reference's distinct-2
EVERY = 3.0  # CPU seconds from snapshot to snapshot; TRL's take as long as an iteration
PPO = {"n_steps": NEW_TOKENS, "batch_size": 512}
GROUPS = {"episodes": ROWS, "group_size": 8, "batch_size": 512, "credit": "token"}
# The agent or TRL's trainer, its settings and the rows that it writes side by side, the learning rates that are tried,
# and the CPU seconds that it gets.
CONTENDERS: dict[str, tuple[str, dict[str, Any], tuple[float, ...], float]] = {
    "PPO": ("PPO", {"rows": 32, **PPO, "batch_size": 256, "gae_lambda": 0.7, "n_epochs": 1}, (3e-4, 4e-4), 40),
    "PPO, defaults": ("PPO", {**PPO, "n_epochs": 4}, (2e-4, 4e-4), 90),
    "GRPO, token": ("GRPO", GROUPS, (4e-4, 6e-4), 40),
    "GRPO, completion": ("GRPO", {**GROUPS, "credit": "completion"}, (4e-4, 6e-4), 60),
    "RLOO, token": ("RLOO", GROUPS, (4e-4, 1e-3), 45),
    "REINFORCE": ("REINFORCE", {"episodes": ROWS, "batch_size": 512}, (4e-4, 1e-3), 60),
    "A2C": ("A2C", {"n_steps": NEW_TOKENS, "gae_lambda": 0.7}, (4e-4, 1e-3), 45),
    "TRL PPO": ("trl-ppo", {}, (2e-4, 4e-4), 200),
    "TRL GRPO": ("trl-grpo", {}, (4e-4, 8e-4), 110),
    "TRL RLOO": ("trl-rloo", {}, (4e-4, 8e-4), 150),
}


class Snapshots:
    """Writes a model's weights now and then, and counts the CPU seconds between, without those of writing.

    :param folder: for the files, ``NUMBER.pt``
    :param every: CPU seconds between two
    """

    def __init__(self, folder: Path, every: float) -> None:
        self.folder, self.every = folder, every
        self.seconds, self.next, self.began = 0.0, every, time.process_time()
        self.taken = 0

    def start(self) -> None:
        self.began = time.process_time()

    def look(self, weights: dict[str, Any], tokens: int) -> float:
        """:return: CPU seconds of training until now; a snapshot is taken if one is due"""
        import torch

        self.seconds += time.process_time() - self.began
        if self.seconds >= self.next:
            self.next = self.seconds + self.every
            torch.save(
                {"weights": weights, "seconds": self.seconds, "tokens": tokens}, self.folder / f"{self.taken}.pt"
            )
            self.taken += 1
        self.began = time.process_time()
        return self.seconds


def train(contender: str, rate: float, seed: int, folder: Path) -> None:
    """One of our agents, in this process."""
    import gymnasium as gym
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    import textgym

    torch.set_num_threads(1)
    algorithm, settings, _, limit = CONTENDERS[contender]
    settings = {"rows": ROWS, **settings}
    rows = settings.pop("rows")
    envs = gym.make_vec("TextGen-v0", num_envs=rows, prompts="train", max_new_tokens=NEW_TOKENS, kl_coef=0.05)
    agent = getattr(textgym.agents, algorithm)(
        "LanguageModelPolicy", envs, learning_rate=rate, seed=seed, device="cpu", **settings
    )
    snapshots = Snapshots(folder, EVERY)

    class Watch(BaseCallback):
        ended = False

        def _on_training_start(self) -> None:
            snapshots.start()

        def _on_rollout_start(self) -> None:
            weights = self.model.policy.language_model.model.state_dict()
            self.ended = snapshots.look(weights, self.num_timesteps) >= limit

        def _on_step(self) -> bool:
            return not self.ended

    agent.learn(10**9, callback=Watch())


def train_peer(contender: str, rate: float, seed: int, folder: Path) -> None:
    """One of TRL's trainers, in an environment that has it."""
    from textgym.embedded import load_prompts
    from textgym.language_model import load_language_model
    from textgym.rewards import as_reward

    trainer, _, _, limit = CONTENDERS[contender]
    policy, reward = load_language_model(), as_reward(None)
    policy.save_pretrained(folder / "policy")
    reward.model.save_pretrained(folder / "reward")
    policy.tokenizer.save_pretrained(folder / "reward")
    (folder / "prompts.json").write_text(json.dumps(load_prompts("train")), encoding="utf-8")
    python, *arguments = command_of(trainer)
    script = Path(__file__).with_name("trl_quality.py")
    command = [python, str(script), *arguments, trainer, str(rate), str(seed), str(limit), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PeerError(f"{contender}:\n{done.stderr[-3000:]}")


def judged(folder: Path) -> dict[str, Any]:
    """What held-out prompts are continued with, by the weights of each snapshot."""
    import torch

    from textgym.embedded import WordSentiment, load_prompts
    from textgym.evaluation import evaluate
    from textgym.language_model import load_language_model
    from textgym.rewards import as_reward

    torch.set_num_threads(1)
    reference, reward, judge = load_language_model(), as_reward(None), WordSentiment()
    model = reference.trainable_copy()
    prompts = load_prompts("test")[:128]
    points: list[dict[str, float]] = []
    texts: list[str] = []

    def measure(seconds: float, tokens: int) -> None:
        found = evaluate(model, reference, reward, prompts, max_new_tokens=NEW_TOKENS, seed=1)
        figures = {name: float(found.figures()[name]) for name in ("score", "kl", "distinct_2", "length")}
        words = judge(prompts=found.prompts, completions=found.completions)
        points.append({"seconds": seconds, "tokens": tokens, **figures, "judge": sum(words) / len(words)})
        texts[:] = [prompt + text for prompt, text in zip(found.prompts[:4], found.completions[:4], strict=True)]

    measure(0.0, 0)
    for path in sorted(folder.glob("*.pt"), key=lambda path: int(path.stem)):
        snapshot = torch.load(path)
        model.model.load_state_dict(snapshot["weights"])
        model.forget_cached()
        measure(snapshot["seconds"], snapshot["tokens"])
    return {"curve": points, "texts": texts}


def seconds_until(curve: list[dict[str, float]], score: float) -> float | None:
    """CPU seconds until a score at a bounded KL and with varied texts; None if that is never seen."""
    varied = LEAST_DISTINCT * curve[0]["distinct_2"]
    times = (p["seconds"] for p in curve if p["score"] >= score and p["kl"] <= MOST_KL and p["distinct_2"] >= varied)
    return next(times, None)


def promise(run: dict[str, Any]) -> tuple[int, float]:
    """To choose a learning rate by, the larger the better: scores that it reached, and minus the seconds."""
    times = [seconds_until(run["curve"], score) for score in SCORES]
    reached = [each for each in times if each is not None]
    return len(reached), -reached[-1] if reached else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), help="of " + "; ".join(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/time_to_quality"), help="where finished runs are kept"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="for time-to-quality.json and .png")
    parser.add_argument("--report", action="store_true", help="only of what has been run")
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "RATE", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.contenders if name not in CONTENDERS]
    if unknown:
        parser.error(f"--contenders {unknown[0]!r}: they are {'; '.join(CONTENDERS)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        name, rate, seed = arguments.one
        run_one = train_peer if "trl" in CONTENDERS[name][0] else train
        with tempfile.TemporaryDirectory(prefix="time_to_quality_") as folder:
            run_one(name, float(rate), int(seed), Path(folder))
            run = {"contender": name, "rate": float(rate), "seed": int(seed), **judged(Path(folder))}
        keep(run, arguments.work, name, rate, seed)
        return

    def runs_of(wanted: list[tuple[str, float, int]]) -> list[dict[str, Any]]:
        if arguments.report:
            wanted = [run for run in wanted if path_of(arguments.work, *run).is_file()]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            return list(pool.map(lambda run: kept_result(__file__, arguments.work, *run), wanted))

    tried = runs_of([(name, rate, SEARCH_SEED) for name in arguments.contenders for rate in CONTENDERS[name][2]])
    rates = {
        name: max((run for run in tried if run["contender"] == name), key=promise)["rate"]
        for name in arguments.contenders
        if any(run["contender"] == name for run in tried)
    }
    # Contenders take turns, so that a machine that grows slower does so for all.
    runs = runs_of([(name, rate, seed) for seed in range(arguments.seeds) for name, rate in rates.items()])
    of = {name: [run for run in runs if run["contender"] == name] for name in rates}
    report({name: some for name, some in of.items() if some}, arguments.output)


def report(runs_of: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Print the table; write it, and the picture."""
    table = {name: figures(runs) for name, runs in runs_of.items()}
    print(f"{'CPU s until':24}" + "".join(f"{score:>12}" for score in SCORES) + "   (median of seeds; – never)")
    for name, row in table.items():
        print(f"{name:24}" + "".join(f"{shown(row['until'][str(score)]):>12}" for score in SCORES))
    summary = {"seeds": max(map(len, runs_of.values())), "contenders": table}
    (output / "time-to-quality.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw(runs_of, output / "time-to-quality.png")


def shown(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.0f}"


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median CPU seconds until each score, where most seeds reached it; and what it was like then."""
    until: dict[str, float | None] = {}
    for score in SCORES:
        times = sorted(t for t in (seconds_until(run["curve"], score) for run in runs) if t is not None)
        never = len(runs) - len(times)
        until[str(score)] = statistics.median([*times, *[float("inf")] * never]) if len(times) > never else None
    last = [run["curve"][-1] for run in runs]
    ends = {name: statistics.mean(point[name] for point in last) for name in last[0]}
    return {"rate": runs[0]["rate"], "until": until, "end": ends, "texts": runs[0]["texts"]}


def draw(runs_of: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Score against CPU seconds, tokens and KL: means over the seeds."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, all_axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained", sharey=True)
    for number, (name, runs) in enumerate(runs_of.items()):
        colour = plt.get_cmap("tab10")(number)
        line = ":" if name.startswith("TRL") else "-"
        for axes, what in zip(all_axes, ("seconds", "tokens", "kl"), strict=True):
            if what == "kl":
                length = min(len(run["curve"]) for run in runs)
                xs = np.mean([[p["kl"] for p in run["curve"][:length]] for run in runs], axis=0)
                ys = np.mean([[p["score"] for p in run["curve"][:length]] for run in runs], axis=0)
            else:
                xs = np.linspace(0, min(run["curve"][-1][what] for run in runs), 60)
                curves = [([p[what] for p in run["curve"]], [p["score"] for p in run["curve"]]) for run in runs]
                ys = np.mean([np.interp(xs, *curve) for curve in curves], axis=0)
            axes.plot(xs, ys, line, color=colour, linewidth=1.8, label=name)
    for axes, label in zip(all_axes, ("CPU seconds of training", "tokens", "KL to the reference, nats"), strict=True):
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("score on held-out prompts")
    all_axes[2].axvline(MOST_KL, color="black", linewidth=0.8, linestyle=":")
    all_axes[2].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
