"""The command ``textgym``: train, resume, generate, chat, evaluate, plot, list environments, rewards and imitation.

It is a thin layer: options become a :class:`~textgym.agents.runs.RunConfig` or the arguments of a function, and what
can go wrong with them is said in one line.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"the command line needs the package {missing.name}: pip install 'textgym[extra]'"
    ) from missing

from textgym.agents.cli.chat import add_chat
from textgym.agents.cli.options import with_run_options
from textgym.agents.cli.sft import add_warm_start
from textgym.agents.cli.texts import add_texts, unescaped
from textgym.agents.cli.train_reward import add_train_reward
from textgym.agents.names import AGENTS
from textgym.agents.runs.config import RunConfig, read_config

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    name="textgym",
    help="Reinforcement learning on text, token by token.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


def _interrupted() -> typer.Exit:
    """What a command ends with after Ctrl-C."""
    Console(stderr=True).print("Interrupted")
    return typer.Exit(130)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Say in one line what is wrong with what the user gave; other errors keep their traceback."""
    try:
        from textgym.agents.distributed.processes import ProcessError
        from textgym.checkpoint_folders import CheckpointError
        from textgym.divergence import DivergedError
        from textgym.replies import ReplyError
        from textgym.rewards import RewardError
    except KeyboardInterrupt:
        raise _interrupted() from None
    said = (ValueError, TypeError, OSError, ModuleNotFoundError, CheckpointError, ProcessError, RewardError, ReplyError)
    try:
        yield
    except KeyboardInterrupt:
        raise _interrupted() from None
    except (*said, DivergedError) as error:
        Console(stderr=True).print(f"[bold red]Error[/bold red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from error


@app.command()
@with_run_options
def train(
    algorithm: Annotated[
        str,
        typer.Argument(help=f"the agent: {', '.join(AGENTS)}, or your own as file.py:Class or module:Class"),
    ] = "ppo",
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML or JSON file with options; flags win")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the run's folder; default runs/AGENT-1, runs/AGENT-2, ...")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="go on with the run in this folder; of the options only --timesteps may change"),
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="with --resume: run Python code that somebody else's run names")
    ] = False,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
    **options: Any,
) -> None:
    """Train a language model on a reward; the run's folder gets everything that comes of it."""
    given = {name: value for name, value in options.items() if value is not None}
    if "stop" in given:
        given["stop"] = [unescaped(text) for text in given["stop"]]
    with _plain_errors():
        from textgym.agents.distributed.processes import ProcessError, Processes
        from textgym.agents.runs.folder import next_free
        from textgym.agents.runs.training import Run, run_config
        from textgym.agents.runs.trust import check_code, check_model_code, code_of
        from textgym.divergence import DivergedError

        if resume is not None:
            changed = sorted(set(given) - {"timesteps"})
            if changed or config is not None or output is not None:
                others = [f"--{name.replace('_', '-')}" for name in changed]
                others += ["--config"] * (config is not None) + ["--output"] * (output is not None)
                raise ValueError(
                    f"--resume goes on with the run as it was begun; {', '.join(others)} can't be changed, "
                    "only --timesteps can"
                )
            begun_with, begun = run_config(resume)
            check_model_code(begun, resume, trust_code)
            check_code(code_of(begun, begun_with), resume, trust_code)
            run = Run.resumed(resume, given.get("timesteps"))
        else:
            from_file = {} if config is None else read_config(config)
            algorithm = from_file.pop("algorithm", algorithm)
            merged = RunConfig.from_mapping({**from_file, **given}, "the configuration")
            processes = Processes.join(merged.process_timeout, cpu=merged.device == "cpu")
            name = _folder_name(str(algorithm))
            run = Run(algorithm, merged, processes.on_main(lambda: output or next_free("runs", name)))
        folder = run.folder.path
        if not run.processes.is_main:
            console.quiet = True
        several = f", in {run.processes.world_size} processes" * (run.processes.world_size > 1)
        console.print(f"Training in [bold]{folder}[/bold]{several}", highlight=False)
        if (few := run.recorder.held_out.said()) is not None:
            console.print(f"  {few}", highlight=False)
        if run.resumed_from is not None:
            console.print(f"  from {run.resumed_from.name}, {run.agent.num_timesteps:,} tokens", highlight=False)
        elif resume is not None:
            console.print("  from the beginning: the run ended before its first checkpoint")
        try:
            finished = run.train(progress_bar=progress)
        except KeyboardInterrupt:
            console.print(f"\nStopped at once. {run.remains}", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
        except (ProcessError, DivergedError) as error:
            if isinstance(error, ProcessError):
                raise ProcessError(f"{error}. {run.remains} (in all processes again)") from error
            raise ValueError(f"{error}. {run.remains}") from error
    Processes.leave()
    _show_progress(run.recorder.evaluations, run.holds_out)
    for sentence in run.recorder.diagnosis():
        console.print(f"[bold yellow]Look at this[/bold yellow] {escape(sentence)}", highlight=False)
    if finished:
        if run.recorder.out_of_patience:
            console.print(f"Ended at {run.agent.num_timesteps:,} tokens: no better held-out score in "
                          f"{run.config.patience} evaluations")  # fmt: skip
        console.print(f"Finished after {run.recorder.seconds:.0f} s. In [bold]{folder}[/bold]: curves.png, samples.md,")
        console.print("metrics.csv, and best/ and model/ (Hugging Face checkpoints that textgym opens as agents, too)")
    else:
        console.print(f"Stopped at {run.agent.num_timesteps:,} tokens; go on with: textgym train --resume {folder}")


def _folder_name(algorithm: str) -> str:
    """What runs of an agent are called: its name, or that of its class."""
    return algorithm.rpartition(":")[2].lower()


def _show_progress(evaluations: list[dict[str, Any]], held_out: bool) -> None:
    """The figures of the first and the newest evaluation, once where they are the same."""
    if not evaluations:
        return
    shown = [evaluations[0], *evaluations[1:][-1:]]
    table = Table(title="Held-out prompts" if held_out else "Training prompts (none are held out)")
    table.add_column("")
    for evaluation in shown:
        table.add_column(f"{evaluation['timesteps']:,} tokens", justify="right")
    rows = [("score", "{:+.3f}"), ("kl", "{:.2f}"), ("perplexity", "{:.1f}"), ("distinct_2", "{:.3f}"),
            ("length", "{:.1f}"), ("eos_rate", "{:.0%}"), ("turns", "{:.2f}"), ("return", "{:+.3f}"),
            ("ended_by_reply", "{:.0%}")]  # fmt: skip
    for name, form in rows:
        if name in shown[0]:
            table.add_row(name.replace("_", "-"), *(form.format(evaluation[name]) for evaluation in shown))
    console.print(table)


add_texts(app, console, _plain_errors)
add_chat(app, console, _plain_errors)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the picture")] = Path("curves.png"),
    separate: Annotated[bool, typer.Option("--separate", help="a colour for each run, instead of bands")] = False,
) -> None:
    """Draw the training curves of runs against each other; those that differ in their seed alone as one band."""
    with _plain_errors():
        from textgym.agents.runs.plots import plot_runs

        plot_runs(runs, output, separate)
        console.print(f"Wrote [bold]{output}[/bold]")


@app.command()
def envs() -> None:
    """List the environment ids and their options."""
    import gymnasium as gym

    import textgym
    from textgym.envs.options import TextGenOptions

    for name, spec in sorted(gym.registry.items()):
        if str(spec.entry_point).startswith("textgym."):
            module, _, attribute = str(spec.entry_point).partition(":")
            summary = inspect.getdoc(getattr(importlib.import_module(module), attribute)) or ""
            console.print(f"[bold]{name}[/bold]  {summary.splitlines()[0] if summary else ''}", highlight=False)
    table = Table(title="Options", show_edge=False)
    table.add_column("option")
    table.add_column("default")
    table.add_column("meaning")
    described = _described_options(inspect.getdoc(textgym.envs.TextGenEnv) or "")
    for field in dataclasses.fields(TextGenOptions):
        default = field.default.value if hasattr(field.default, "value") else field.default
        table.add_row(field.name, escape(repr(default)), escape(described.get(field.name, "")))
    console.print(table)


@app.command("rewards")
def list_rewards() -> None:
    """List the rewards that --reward knows by name, with their arguments."""
    with _plain_errors():
        from textgym import rewards
        from textgym.rewards.expressions import reward_names, written

        names: dict[str, str] = {}
        for name, kind in reward_names().items():
            names.setdefault(kind, name)  # the shortest
        console.print("[bold]embedded[/bold]  the sentiment model that ships with textgym, from −1 to 1")
        for kind, name in sorted(names.items(), key=lambda item: item[1]):
            reward = getattr(rewards, kind)
            arguments = written(inspect.signature(reward))
            summary = (inspect.getdoc(reward) or "").splitlines()[0].replace("``", "")
            console.print(f"[bold]{name}[/bold]({escape(arguments)})  {escape(summary)}", highlight=False)
        console.print("\nCombine them: --reward \"0.5*keywords(['rain']) + 0.5*grammar.clip(0, 1)\"", highlight=False)


def _described_options(manual: str) -> dict[str, str]:
    """What the environment's manual says of each option, from its table."""
    described = {}
    for line in manual.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.strip().startswith("| ``") and len(cells) == 3:
            for name in cells[0].replace("``", "").split(", "):
                described[name] = cells[2].replace("``", "")
    return described


@app.command("serve-reward")
def serve_reward(
    reward: Annotated[
        str,
        typer.Argument(
            help="as for train: a formula such as 0.5*coherence + 0.5*grammar, file.py:function, module:object, "
            "a directory, a hub id, or embedded"
        ),
    ] = "embedded",
    host: Annotated[str, typer.Option(help="address to listen on; there is no authentication")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port")] = 8700,
    label_column: Annotated[str, typer.Option(help="column under which the reward gets the labels sent")] = "labels",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that comes with a reward model")
    ] = False,
) -> None:
    """Serve a reward over HTTP, with the protocol of OpenRLHF's reward server.

    In other processes it is RemoteReward("http://HOST:PORT/get_reward").
    """
    with _plain_errors():
        from textgym.rewards import serve_reward as serve
        from textgym.rewards.opening import load_reward

        served = load_reward(reward, trust_remote_code)
        console.print(f"Serving [bold]{escape(served.name)}[/bold] at http://{host}:{port}/get_reward", highlight=False)
        serve(served, host, port, label_column)


add_train_reward(app, console, _plain_errors)
add_warm_start(app, console, _plain_errors)


def main() -> None:
    """What the console command runs."""
    warnings.simplefilter("default", UserWarning)
    sys.exit(app())
