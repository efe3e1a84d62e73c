"""One contender in a process of its own: ``python benchmarks/worker.py --contender NAME --workload JSON``.

It speaks lines of JSON. First it says ``{"ready": {...}}``; at ``{"go": 1}`` it runs one iteration and answers with
what that took; at ``{"stop": 1}`` it answers with its peak memory and ends. While it waits it uses no processor, so
that contenders can take turns. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import argparse
import resource
import sys
from typing import Any, Protocol

from measures import Channel, Clock, bandwidth, peak_memory
from workload import Workload


class Contender(Protocol):
    """What :func:`serve` runs. ``covers`` names the phases that it has; a peer is compared over those."""

    covers: tuple[str, ...]

    def iterate(self, clock: Clock) -> dict[str, Any]:
        """Run one iteration and return what is to be reported beside the times, ``tokens`` at least."""


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
