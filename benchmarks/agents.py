"""All agents on the same tasks with the same budget of tokens: score against tokens and against KL, time and memory.

    python benchmarks/agents.py                       # everything; hours on two cores
    python benchmarks/agents.py --tasks alphabet --agents ppo grpo --seeds 3
    python benchmarks/agents.py --report              # the table and the plots of what has been run

Each agent's learning rate is chosen on a seed of its own among two or three, by the return (score minus β · KL) of
texts drawn after the budget; then it is trained on the seeds 0, 1, 2. Every run is a process of its own with one
thread. What is done is kept (``--work``), so a run that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from separate_runs import keep, kept_result, path_of

SEARCH_SEED = 1_000
KL_COEF = {"alphabet": 0.01, "alphabet-end": 0.01, "reviews": 0.05}
# What is compared: an agent of the command line, and its options beside the learning rate.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "PPO": ("ppo", {"batch_size": 128}),
    "A2C": ("a2c", {"normalize_advantage": "rollout"}),
    "REINFORCE": ("reinforce", {"normalize_advantage": "rollout"}),
    "RLOO": ("rloo", {"normalize_advantage": "rollout"}),
    "RLOO, token": ("rloo", {"credit": "token", "normalize_advantage": "rollout"}),
    "GRPO": ("grpo", {"n_epochs": 2, "batch_size": 128}),
    "GRPO, token": ("grpo", {"credit": "token", "n_epochs": 2, "batch_size": 128}),
    "Soft Q-learning": ("softq", {}),
    "Q-learning": ("q", {}),
    "SARSA": ("sarsa", {}),
    "NLPO": ("nlpo", {"batch_size": 128}),
    "TRPO": ("trpo", {}),
    "Expert iteration": ("expert", {"n_epochs": 2, "batch_size": 128}),
    "DPO, offline": ("dpo", {"group_size": 4, "n_epochs": 2, "batch_size": 128}),
    "DPO, online": ("dpo", {"group_size": 4, "n_epochs": 2, "batch_size": 128, "offline": False}),
}


def train(task_name: str, contender: str, rate: float, seed: int) -> dict[str, Any]:
    """One run, in this process."""
    import torch
    from agent_tasks import TASKS
    from stable_baselines3.common.callbacks import BaseCallback

    from textgym.agents.runs.agents import agent_class, arguments_of, resolved
    from textgym.agents.runs.config import RunConfig

    torch.set_num_threads(1)
    task = TASKS[task_name]
    algorithm, options = CONTENDERS[contender]
    if algorithm in ("q", "sarsa"):
        # Their policy is soft, and the letters' rewards are small: what a nat is worth decides how sure it can get.
        options = {**options, "q_temperature": KL_COEF[task_name]}
    envs = task.environment(seed)
    config = resolved(
        algorithm,
        RunConfig(rows=envs.num_envs, max_new_tokens=envs.max_new_tokens, learning_rate=rate, **options),
    )
    agent = agent_class(algorithm)(
        "LanguageModelPolicy", envs, seed=seed, device="cpu", **arguments_of(algorithm, config)
    )

    class Curve(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.points: list[dict[str, float]] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            ended = self.model.finished_episodes
            if ended:
                means = {name: sum(e[name] for e in ended) / len(ended) for name in ("score", "kl", "l")}
                self.points.append({"tokens": self.num_timesteps, "seconds": time.process_time() - begin, **means})

    before = task.measures(agent.policy.language_model)
    begin = time.process_time()
    curve = Curve()
    agent.learn(task.budget, callback=curve)
    seconds = time.process_time() - begin
    return {
        "task": task_name,
        "agent": contender,
        "rate": rate,
        "seed": seed,
        "before": before,
        "after": task.measures(agent.policy.language_model),
        "seconds": seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "curve": curve.points,
        "texts": agent.policy.generate(
            ["the film is", "i think"] if task_name == "reviews" else ["c", "n"],
            max_new_tokens=envs.max_new_tokens,
            min_new_tokens=envs.options.min_new_tokens,
            seed=0,
        ),
    }


def objective(run: dict[str, Any]) -> float:
    """The return that agents are trained for."""
    return float(run["after"]["score"] - KL_COEF[run["task"]] * run["after"]["kl"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(KL_COEF), choices=list(KL_COEF))
    parser.add_argument("--agents", nargs="+", default=list(CONTENDERS), help="of " + "; ".join(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=Path(".cache/agents"), help="where finished runs are kept")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="for agents.json and agents-TASK.png")
    parser.add_argument("--report", action="store_true", help="only of what has been run")
    parser.add_argument("--one", nargs=4, metavar=("TASK", "AGENT", "RATE", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in arguments.agents:
        if name not in CONTENDERS:
            parser.error(f"--agents {name!r}: the agents are {'; '.join(CONTENDERS)}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        task, contender, rate, seed = arguments.one
        run = train(task, contender, float(rate), int(seed))
        keep(run, arguments.work, task, contender, rate, seed)
        return
    from agent_tasks import TASKS

    chosen: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def compare(task: str, contender: str) -> None:
        rates = TASKS[task].rates
        if arguments.report and not all(
            path_of(arguments.work, task, contender, rate, SEARCH_SEED).is_file() for rate in rates
        ):
            return
        tried = [kept_result(__file__, arguments.work, task, contender, rate, SEARCH_SEED) for rate in rates]
        best = max(tried, key=objective)["rate"]
        seeds = range(arguments.seeds)
        if arguments.report:
            seeds = [s for s in seeds if path_of(arguments.work, task, contender, best, s).is_file()]  # type: ignore
        runs = [kept_result(__file__, arguments.work, task, contender, best, seed) for seed in seeds]
        if runs:
            chosen[task, contender] = runs
            scores = ", ".join(f"{run['after']['score']:.3f}" for run in runs)
            print(f"{task}: {contender}, learning rate {best:g}: {scores}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda pair: compare(*pair), [(t, a) for t in arguments.tasks for a in arguments.agents]))
    arguments.output.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"python": platform.python_version(), "tasks": {}}
    for task in arguments.tasks:
        runs_of = {name: chosen[task, name] for name in arguments.agents if (task, name) in chosen}
        if not runs_of:
            continue
        table = {name: figures(runs) for name, runs in runs_of.items()}
        summary["tasks"][task] = {"budget": TASKS[task].budget, "before": before(runs_of), "agents": table}
        print("\n" + markdown(task, table, before(runs_of)))
        draw(task, runs_of, arguments.output / f"agents-{task}.png")
    (arguments.output / "agents.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def before(runs_of: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """The figures of the model that all agents start from."""
    figures: dict[str, float] = next(iter(runs_of.values()))[0]["before"]
    return figures


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, and the tokens after which half of the gain was there."""
    table: dict[str, Any] = {"rate": runs[0]["rate"], "seeds": len(runs)}
    for name in runs[0]["after"]:
        values = [run["after"][name] for run in runs]
        table[name] = [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
    table["seconds"] = statistics.mean(run["seconds"] for run in runs)
    table["memory"] = statistics.mean(run["memory"] for run in runs)
    table["texts"] = runs[0]["texts"]
    return table


def markdown(task: str, table: dict[str, Any], start: dict[str, float]) -> str:
    """The table of a task, best agent first."""
    judged = "judge" in start
    head = ["agent", "learning rate", "score", "KL, nats", *(["word judge"] * judged), "distinct-2", "CPU s", "MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    names = ["score", "kl", *(["judge"] * judged), "distinct_2"]
    lines.append("| *before* | | " + " | ".join(f"{start[name]:.3f}" for name in names) + " | | |")
    for agent, row in sorted(table.items(), key=lambda item: -item[1]["score"][0]):
        cells = [f"{row[name][0]:.3f} ± {row[name][1]:.3f}" for name in names]
        lines.append(
            f"| {agent} | {row['rate']:g} | "
            + " | ".join(cells)
            + f" | {row['seconds']:.0f} | {row['memory'] / 2**20:.0f} |"
        )
    return "\n".join(lines)


def draw(task: str, runs_of: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Score against tokens, mean and range over the seeds, and score against KL."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    colours = plt.get_cmap("tab20")
    for number, (name, runs) in enumerate(runs_of.items()):
        grid = np.linspace(0, min(run["curve"][-1]["tokens"] for run in runs), 60)[1:]
        curves = {}
        for figure_name in ("score", "kl"):
            rows = [np.interp(grid, *_smoothed(run["curve"], figure_name)) for run in runs]
            curves[figure_name] = np.stack(rows)
        style = {"color": colours(number % 20), "linewidth": 1.6}
        left.plot(grid, curves["score"].mean(0), label=name, **style)
        left.fill_between(grid, curves["score"].min(0), curves["score"].max(0), color=style["color"], alpha=0.12)
        right.plot(curves["kl"].mean(0), curves["score"].mean(0), **style)
    left.set(xlabel="tokens of training", ylabel="score Φ of finished texts", title=task)
    right.set(xlabel="KL to the reference, nats per completion", title="what the score costs")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _smoothed(curve: list[dict[str, float]], name: str, width: int = 8) -> tuple[list[float], list[float]]:
    """Tokens, and the mean of the newest few rollouts at each."""
    values = [point[name] for point in curve]
    means = [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
    return [point["tokens"] for point in curve], means


if __name__ == "__main__":
    main()
