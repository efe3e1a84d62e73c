"""One contender in a process of its own: ``python benchmarks/worker.py --contender NAME --workload JSON``.

It speaks lines of JSON. First it says ``{"ready": {...}}``; at ``{"go": 1}`` it runs one iteration and answers with
what that took; at ``{"stop": 1}`` it answers with its peak memory and ends. While it waits it uses no processor, so
that contenders can take turns. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from workload import Workload

PHASES = ("rollout", "score", "update")


class Contender(Protocol):
    """What :func:`serve` runs. ``covers`` names the phases that it has; a peer is compared over those."""

    covers: tuple[str, ...]

    def iterate(self, clock: Clock) -> dict[str, Any]:
        """Run one iteration and return what is to be reported beside the times, ``tokens`` at least."""


class Clock:
    """Wall and CPU seconds of an iteration by phase: each lap ends a stretch and says what it was.

    :param device: a CUDA device is waited for at the end of each lap
    """

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")
        self.start()

    def start(self) -> None:
        """Begin an iteration."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.cpu = dict.fromkeys(PHASES, 0.0)
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Add the time since the last lap to a phase."""
        now = self._now()
        self.seconds[phase] += now[0] - self._last[0]
        self.cpu[phase] += now[1] - self._last[1]
        self._last = now

    def _now(self) -> tuple[float, float]:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()  # CPU seconds are those of all threads


class Channel:
    """The lines to and from the driver, kept apart from what libraries print."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def wait_for_go(self) -> bool:
        """Sleep until told to go on; False if told to stop, or if the driver is gone."""
        line = sys.stdin.readline()
        return bool(line) and "go" in json.loads(line)

    def answer(self, clock: Clock, **facts: Any) -> None:
        """Report an iteration."""
        decode = facts["tokens"] / clock.seconds["rollout"] if clock.seconds["rollout"] else None
        self.say({"seconds": clock.seconds, "cpu": clock.cpu, "decode_tokens_per_s": decode, **facts})

    def ready(self, covers: tuple[str, ...], **facts: Any) -> None:
        """Say that all is loaded, with the versions it runs with."""
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.say({"ready": {"covers": covers, "versions": versions, **facts}})


def peak_memory(device: str) -> dict[str, int]:
    """Most memory this process has had, in bytes: resident, and on a GPU allocated."""
    # ru_maxrss goes on from what the process was before it became this program.
    status = Path("/proc/self/status")
    if status.exists():
        resident = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    memory = {"resident": resident * 1024}
    if device.startswith("cuda"):
        import torch

        memory["allocated"] = torch.cuda.max_memory_allocated()
    return memory


def bandwidth(device: str) -> dict[str, float]:
    """Bytes a second that a CUDA device reads and writes when it copies 1 GiB; nothing for a CPU."""
    if not device.startswith("cuda"):
        return {}
    import torch

    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = max(best, 2 * source.numel() / (time.perf_counter() - start))
    del source, target
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {"bytes_per_s": best}


def serve(channel: Channel, contender: Contender, workload: Workload) -> None:
    """Run iterations when asked to."""
    channel.ready(contender.covers, **bandwidth(workload.device))
    clock = Clock(workload.device)
    while channel.wait_for_go():
        clock.start()
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        answer = contender.iterate(clock)
        answer["pages"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages  # that the system provided
        channel.answer(clock, **answer)


def build(name: str, workload: Workload) -> Contender:
    """:raises ValueError: if there is no contender of that name"""
    import bare_model  # not both: what a contender doesn't need must not be in its memory

    if name in bare_model.CONTENDERS:
        return bare_model.CONTENDERS[name](workload)
    import ours

    if name in ours.CONTENDERS:
        return ours.CONTENDERS[name](workload)
    raise ValueError(f"contender={name!r} must be one of {', '.join([*bare_model.CONTENDERS, *ours.CONTENDERS])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--workload", required=True, type=Workload.from_json)
    parser.add_argument("--trl-path", help="an unpacked wheel of TRL to use instead of the one that is installed")
    arguments = parser.parse_args()
    channel, workload = Channel(), arguments.workload
    if arguments.trl_path:
        sys.path.insert(0, arguments.trl_path)

    import torch

    torch.set_num_threads(workload.threads)
    if arguments.contender.startswith("trl-"):
        import trl_peers

        trl_peers.run(arguments.contender, workload, channel)
    else:
        serve(channel, build(arguments.contender, workload), workload)
    channel.say({"memory": peak_memory(workload.device)})


if __name__ == "__main__":
    main()
