"""A whole PPO iteration, textgym's, its peers' and the least it could take, side by side.

    make benchmark                                        # small model, fixed and ragged completions, some minutes
    make benchmark ARGS="--preset 135m --fixed --rounds 3"
    python benchmarks/iteration.py --contenders textgym,trl-ppo --rounds 9 --new-tokens 128 --prompt-tokens 64
    python benchmarks/iteration.py --device cuda --dtype bfloat16 --rows 64

Everyone does the same work with models of the same shape and random weights (``workload.py`` says what it is). Each
contender is a process of its own, so that memory is its own too, and they take turns within each round, so that a noisy
machine hits all alike. The first round is warm-up; the table has medians over the others. Absolute times say little:
compare within one run.

- ``textgym``: its PPO, fp32, deferred scoring; ``textgym-compiled``: the same through ``torch.compile``;
  ``textgym-fast``: the fastest setting (``fastest`` in ``ours.py``); ``textgym-instant``: rollouts that score each
  token before the next
- ``textgym-grpo``: its GRPO, groups of 8 completions of a prompt
- ``floor-fp32``, ``floor-bf16``: the same matrix work and nothing else (``bare_model.py``); ``floor-groups``: that of
  groups, fp32
- ``generate``, ``generate-bf16``: sampling with transformers
- ``trl-ppo``, ``trl-grpo``, ``trl-rloo``: TRL's trainers (``trl_peers.py``), installed into ``.cache/peers`` when asked
  for
- ``sb3``: the update of Stable-Baselines3's PPO over single steps, one minibatch of it, scaled

A contender is compared with textgym over the phases that it has, per real token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peers
from report import write_report
from workload import PRESETS, Workload, cores

FOLDER = Path(__file__).resolve().parent
CONTENDERS = (
    "textgym",
    "textgym-compiled",
    "textgym-fast",
    "textgym-instant",
    "textgym-grpo",
    "floor-fp32",
    "floor-bf16",
    "floor-groups",
    "generate",
    "generate-bf16",
    "trl-ppo",
    "trl-grpo",
    "trl-rloo",
    "sb3",
)
DEFAULT_CONTENDERS = {
    "small": tuple(name for name in CONTENDERS if name not in ("generate-bf16", "textgym-grpo", "floor-groups")),
    "135m": ("textgym", "textgym-fast", "floor-fp32", "floor-bf16", "generate", "trl-ppo"),  # minutes each
}
BEFORE = "-before"
LOG_LINES = 12  # of a failed worker's log, in the message


class WorkerError(RuntimeError):
    """A contender's process ended, or could not begin."""


class Worker:
    """A contender's process.

    :param contender: its name
    :param workload: what it works on
    :param log: file for what it prints
    :param python: the interpreter, for a contender that is no peer
    :raises WorkerError: if it can't be started
    """

    def __init__(self, contender: str, workload: Workload, log: Path, python: str = sys.executable) -> None:
        self.contender, self.log = contender, log
        try:
            python, *arguments = peers.command_of(contender) if peers.is_peer(contender) else [python]
        except peers.PeerError as e:
            raise WorkerError(f"{contender} can't be installed: {e}") from e
        script = [str(FOLDER / "worker.py"), "--contender", contender, "--workload", workload.to_json()]
        with log.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [python, *script, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(workload),
            )
        self.facts = self._read()["ready"]

    def iterate(self) -> dict[str, Any]:
        """One iteration: its answer, and ``wall``, the seconds until it came."""
        start = time.perf_counter()
        answer = self._ask({"go": 1})
        return {**answer, "wall": time.perf_counter() - start}

    def stop(self) -> dict[str, int]:
        """End the process; its peak memory in bytes."""
        memory: dict[str, int] = self._ask({"stop": 1})["memory"]
        self.process.wait(timeout=60)
        self.close()
        return memory

    def close(self) -> None:
        """End the process if it has not ended."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.process.wait()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which reading says better
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(timeout=60)
            self.close()
            last = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            raise WorkerError(
                f"{self.contender} ended with exit code {self.process.returncode}; {self.log} ends with:\n  "
                + "\n  ".join(last)
            )
        message: dict[str, Any] = json.loads(line)
        return message


def _environment(workload: Workload) -> dict[str, str]:
    settings = {
        "OMP_NUM_THREADS": str(workload.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "WANDB_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
    }
    if workload.device == "cpu":
        settings["ACCELERATE_USE_CPU"] = "true"
    return {**os.environ, **settings}


def measure(
    workload: Workload,
    contenders: Sequence[str],
    rounds: int,
    logs: Path,
    alone: bool = False,
    before: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Let contenders take turns.

    :param rounds: that count; one more, the first, does not
    :param logs: folder for what they print
    :param alone: whether each begins anew, and warms up, for each of its turns, so that only one is in memory
    :param before: an interpreter with an older build, on which ``NAME-before`` is what ``NAME`` is on this one
    :return: for each contender what it said when it was ready, ``rounds``, its answers, and ``memory``; or ``failed``
    """
    results: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in contenders}
    workers: dict[str, Worker] = {}
    logs.mkdir(parents=True, exist_ok=True)

    def start(name: str) -> None:  # one after the other, for loading is work, too
        contender, python = name.removesuffix(BEFORE), sys.executable
        if name != contender:
            assert before is not None
            python = before
        workers[name] = Worker(contender, workload, logs / f"{workload.name}-{name}.log", python)
        results[name].update(workers[name].facts)

    def stop(name: str) -> None:
        memory, before = workers.pop(name).stop(), results[name].get("memory", {})
        results[name]["memory"] = {kind: max(size, before.get(kind, 0)) for kind, size in memory.items()}

    @contextlib.contextmanager
    def noting_failure(name: str) -> Iterator[None]:
        try:
            yield
        except WorkerError as e:
            say(str(e))
            workers.pop(name, None)
            results[name] = {"rounds": [], "failed": str(e)}

    try:
        for name in () if alone else contenders:
            say(f"{workload.name}: starting {name} ...")
            with noting_failure(name):
                start(name)
        for number in range(int(alone), rounds + 1):
            say(f"{workload.name}: {f'round {number} of {rounds}' if number else 'warm-up'} ...")
            names = [name for name in contenders if "failed" not in results[name]]
            for name in names[number % len(names) :] + names[: number % len(names)] if names else ():
                with noting_failure(name):
                    if alone:
                        start(name)
                        workers[name].iterate()
                    answer = workers[name].iterate()
                    if number:
                        results[name]["rounds"].append(answer)
                    if alone:
                        stop(name)
        for name in list(workers):
            with noting_failure(name):
                stop(name)
    finally:
        for worker in workers.values():
            worker.close()
    return results


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small", help="shape of the models (default %(default)s)")
    shape = parser.add_mutually_exclusive_group()
    for name in ("fixed", "ragged", "both"):
        shape.add_argument(f"--{name}", dest="shape", action="store_const", const=name)
    parser.add_argument("--rounds", type=int, default=5, help="each contender runs once a round; a warm-up comes first")
    parser.add_argument("--threads", type=int, default=cores(), help="default: all cores")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, help="prompts side by side (32)")
    parser.add_argument("--prompt-tokens", type=int, help="(8)")
    parser.add_argument("--new-tokens", type=int, help="most tokens of a completion (48)")
    parser.add_argument(
        "--steps", type=int, help="tokens of a row in textgym's rollouts; default: the most tokens of a completion"
    )
    parser.add_argument(
        "--alone",
        action=argparse.BooleanOptionalAction,
        help="begin anew for each turn, so that only one contender is in memory; default with --preset 135m on a CPU",
    )
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--contenders", help=f"some of {','.join(CONTENDERS)}, with commas between")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder for table, JSON and plot")
    parsed = parser.parse_args(arguments)
    parsed.shape = parsed.shape or "both"
    if parsed.alone is None:
        parsed.alone = parsed.preset == "135m" and parsed.device == "cpu"
    names = parsed.contenders.split(",") if parsed.contenders else DEFAULT_CONTENDERS[parsed.preset]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        parser.error(f"--contenders: {', '.join(unknown)} unknown; there are {', '.join(CONTENDERS)}")
    if parsed.rounds < 1:
        parser.error(f"--rounds={parsed.rounds} must be at least 1")
    parsed.contenders = tuple(dict.fromkeys(names))
    try:
        parsed.workloads = workloads_of(parsed)
    except ValueError as e:
        parser.error(str(e))
    return parsed


def workloads_of(parsed: argparse.Namespace) -> list[Workload]:
    """What the flags say.

    :raises ValueError: if it is impossible
    """
    changes = {
        "rows": parsed.rows,
        "prompt_tokens": parsed.prompt_tokens,
        "new_tokens": parsed.new_tokens,
        "steps": parsed.steps,
        "threads": parsed.threads,
        "device": parsed.device,
        "dtype": parsed.dtype,
        "compile": not parsed.eager,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    shapes = {"fixed": (False,), "ragged": (True,), "both": (False, True)}[parsed.shape]
    return [PRESETS[parsed.preset].replace(ragged=ragged, **changes) for ragged in shapes]


def main() -> int:
    arguments = parse()
    works = []
    for workload in arguments.workloads:
        logs = arguments.output / "logs"
        results = measure(workload, arguments.contenders, arguments.rounds, logs, arguments.alone)
        works.append((workload, results))
    print(write_report(works, arguments.preset, arguments.rounds, arguments.output))
    return int(any("failed" in result for _, results in works for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
