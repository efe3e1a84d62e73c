"""What a contender measures itself with, and how it answers the driver: phases, times, memory and lines of JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

PHASES = ("rollout", "score", "update")


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
