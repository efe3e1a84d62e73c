"""Learning in turns: a guessing game and a calculator, with credit for tokens, for turns, and for the whole.

    python benchmarks/turn_tasks.py                    # an hour on two cores
    python benchmarks/turn_tasks.py --tasks guess --seeds 1
    python benchmarks/turn_tasks.py --report           # the table and the plots of what has been run

The tasks are those of ``examples/guessing_game.py`` and ``examples/calculator.py``. All contenders begin with the same
model, get the same rewards in all, and as many tokens. What differs is which tokens a reward is credited to:

- PPO, each turn: what Φ gained in a turn is paid at its end; GAE and the critic divide it
- PPO, at the end: Φ of the whole is paid once, and GAE's λ is 1
- GRPO with ``credit="token"``, ``"turn"`` and ``"completion"``
- PPO with a learning rate of 0, which must not learn

Every run is a process of its own with one thread. What is done is kept (``--work``), so a run that was broken off goes
on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from separate_runs import keep, kept_result, path_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

BUDGET = {"guess": 131_072, "calculator": 65_536}
RATES = {"guess": {"PPO": 3e-3, "GRPO": 1.5e-3}, "calculator": {"PPO": 4e-4, "GRPO": 4e-4}}  # fall linearly to 0
PPO = {"guess": {"n_steps": 32, "gae_lambda": 0.7}, "calculator": {"n_steps": 64}}
GROUPS = {"group_size": 16, "episodes": 128, "n_epochs": 4, "batch_size": 512}
CONTENDERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "PPO, each turn": ("PPO", {}, {"reward_every": "turn"}),
    "PPO, at the end": ("PPO", {"gae_lambda": 1.0}, {"reward_every": "end"}),
    "GRPO, token": ("GRPO", {"credit": "token"}, {"reward_every": "turn"}),
    "GRPO, turn": ("GRPO", {"credit": "turn"}, {"reward_every": "turn"}),
    "GRPO, completion": ("GRPO", {"credit": "completion"}, {"reward_every": "turn"}),
    "PPO, learning rate 0": ("PPO", {"learning_rate": 0.0}, {"reward_every": "turn"}),
}
MEASURES = {"guess": ("guesses", "guesses until the number is found"), "calculator": ("right", "share of right sums")}
BINARY_SEARCH = (1 + 2 * 2 + 4 * 3 + 8 * 4 + 5) / 16  # guesses for 16 numbers, on average


def example(task: str) -> Any:
    """The script that has the task."""
    import calculator
    import guessing_game

    return {"guess": guessing_game, "calculator": calculator}[task]


def train(task: str, contender: str, seed: int, work: Path) -> dict[str, Any]:
    """One run, in this process."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    import textgym
    from textgym.evaluation import evaluate

    torch.set_num_threads(1)
    algorithm, arguments, options = CONTENDERS[contender]
    envs = example(task).environment(work / f"beginner-{task}", **options)
    rate = RATES[task][algorithm]
    settings = {"batch_size": 1024, **PPO[task]} if algorithm == "PPO" else GROUPS
    settings = {"learning_rate": lambda left: left * rate, **settings, **arguments}
    agent = getattr(textgym.agents, algorithm)("LanguageModelPolicy", envs, seed=seed, device="cpu", **settings)
    name = MEASURES[task][0]

    def value(completions: list[str], scores: list[float]) -> float:
        values = [len(text.split("\n")) for text in completions] if task == "guess" else scores
        return statistics.mean(values)

    points: list[dict[str, float]] = []

    class Curve(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            ended = self.model.finished_episodes
            if ended:
                now = value([e["completion"] for e in ended], [e["score"] for e in ended])
                points.append({"tokens": self.num_timesteps, "seconds": time.process_time() - begin, name: now})

    def measure() -> float:
        prompts = (
            example(task).questions(512, seed=3)
            if task == "calculator"
            else [{"prompt": "guess:", "secret": secret} for secret in range(16)] * 32
        )
        model = agent.policy.language_model
        found = evaluate(model, model, envs.reward, prompts, envs.sampling, reply=envs.reply, seed=1)
        return value(found.completions, found.scores.tolist())

    before = measure()
    begin = time.process_time()
    agent.learn(BUDGET[task], callback=Curve())
    return {
        "task": task,
        "contender": contender,
        "seed": seed,
        "before": before,
        "after": measure(),
        "seconds": time.process_time() - begin,
        "curve": points,
        "texts": [episode["completion"] for episode in random.Random(0).sample(agent.finished_episodes, 3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(BUDGET), choices=list(BUDGET))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), help="of " + "; ".join(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=Path(".cache/turn_tasks"), help="where finished runs are kept")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="for turns.json and turns-TASK.png")
    parser.add_argument("--report", action="store_true", help="only of what has been run")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "CONTENDER", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        task, contender, seed = arguments.one
        keep(train(task, contender, int(seed), arguments.work), arguments.work, task, contender, seed)
        return
    unknown = [name for name in arguments.contenders if name not in CONTENDERS]
    if unknown:
        parser.error(f"--contenders {unknown[0]!r}: they are {'; '.join(CONTENDERS)}")
    wanted = [
        (task, name, seed)
        for seed in range(arguments.seeds)
        for task in arguments.tasks
        for name in arguments.contenders
        if seed == 0 or "rate 0" not in name
    ]
    for task in arguments.tasks:  # the same model for all
        if not (arguments.work / f"beginner-{task}").is_dir():
            begin(task, arguments.work)
    if arguments.report:
        wanted = [run for run in wanted if path_of(arguments.work, *run).is_file()]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda run: kept_result(__file__, arguments.work, *run), wanted))
    summary = {}
    for task in arguments.tasks:
        of = {name: [run for run in runs if (run["task"], run["contender"]) == (task, name)] for name in CONTENDERS}
        of = {name: some for name, some in of.items() if some}
        table = {name: figures(some) for name, some in of.items()}
        before = statistics.mean(run["before"] for some in of.values() for run in some)
        summary[task] = {"budget": BUDGET[task], "before": before, "contenders": table}
        print(f"\n{task}: {MEASURES[task][1]}, {BUDGET[task]} tokens, {before:.3f} before")
        for name, row in table.items():
            print(f"{name:24}{row['after'][0]:8.3f} ± {row['after'][1]:.3f}{row['seconds']:8.0f} CPU s")
        draw(task, of, before, arguments.output / f"turns-{task}.png")
    (arguments.output / "turns.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def begin(task: str, work: Path) -> None:
    """Make the model that all begin with."""
    import torch

    torch.set_num_threads(1)
    example(task).beginner().save_pretrained(work / f"beginner-{task}")


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    after = [run["after"] for run in runs]
    return {
        "seeds": len(runs),
        "after": [statistics.mean(after), statistics.stdev(after) if len(after) > 1 else 0.0],
        "seconds": statistics.mean(run["seconds"] for run in runs),
        "texts": runs[0]["texts"],
    }


def draw(task: str, runs_of: dict[str, list[dict[str, Any]]], before: float, path: Path) -> None:
    """The measure of finished episodes against tokens, mean and range over the seeds."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    ends = {}
    for number, (name, runs) in enumerate(runs_of.items()):
        grid = np.linspace(0, min(run["curve"][-1]["tokens"] for run in runs), 80)[1:]
        rows = np.stack([np.interp(grid, *_smoothed(run["curve"], MEASURES[task][0])) for run in runs])
        colour = "#888888" if "rate 0" in name else plt.get_cmap("tab10")(number)
        axes.plot(grid, rows.mean(0), color=colour, linewidth=1.8)
        axes.fill_between(grid, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)
        ends[name] = (rows.mean(0)[-1], grid[-1], colour)
    # Names stand at the ends of their lines, from below, and no nearer to each other than they are high.
    low, high = axes.get_ylim()
    place = -np.inf
    for name, (value, last, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
        place = max(value, place + 0.055 * (high - low))
        axes.annotate(f" {name}", (last, place), color=colour, va="center", annotation_clip=False)
    if task == "guess":
        axes.axhline(BINARY_SEARCH, color="black", linewidth=0.8, linestyle=":")
        axes.annotate("binary search", (0, BINARY_SEARCH), va="bottom")
    axes.set(xlabel="tokens of training", ylabel=MEASURES[task][1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _smoothed(curve: list[dict[str, float]], name: str, width: int = 5) -> tuple[list[float], list[float]]:
    """Tokens, and the mean of the newest few rollouts at each."""
    values = [point[name] for point in curve]
    means = [statistics.mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
    return [point["tokens"] for point in curve], means


if __name__ == "__main__":
    main()
