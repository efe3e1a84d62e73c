"""How much memory a PPO iteration takes, and what for, in each setting and in TRL's PPO; and how it grows with V.

    python benchmarks/memory.py                                       # the shape of SmolLM2-135M; some minutes, 6 GiB
    python benchmarks/memory.py --settings full,lora --rows 32 --new-tokens 128
    python benchmarks/memory.py --device cuda --rows 64 --output runs/memory
    python benchmarks/memory.py --vocabularies ""                     # without the second table

Each setting is a process of its own, one after another, and runs one iteration: a rollout, its scoring and two
optimizer steps. More epochs would take more time and no more memory. Peaks are of the resident set, or of what is
allocated on a GPU; those of the parts of an iteration are known where the system lets a process reset its own peak
(Linux), or on a GPU. Nothing of this depends on how busy the machine is.

The tensors are counted one by one. What is saved for the backward pass is what autograd keeps in one minibatch, without
the weights themselves. The rest of the peak is the program (Python, torch), gradients inside the backward pass,
caches, and memory that the allocator keeps.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from iteration import Worker, WorkerError
from measures import Channel, Clock, peak_memory
from workload import PRESETS, Workload

FOLDER = Path(__file__).resolve().parent
MIB = 2**20
TRL = "trl-ppo"
EIGHT_BIT = {"optimizer_class": "bitsandbytes.optim.Adam8bit"}  # opened where it is used
# policy_kwargs, and the type of reference and reward model.
SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "full": ("all weights, fp32", {}, "float32"),
    "autocast": ("and `autocast`", {"autocast": "bfloat16"}, "float32"),
    "rollout": ("and `rollout_dtype`", {"rollout_dtype": "bfloat16"}, "float32"),
    "mixed": (
        "`autocast`, `rollout_dtype`, frozen models in bf16",
        {"autocast": "bfloat16", "rollout_dtype": "bfloat16"},
        "bfloat16",
    ),
    "checkpointing": ("and `gradient_checkpointing`", {"gradient_checkpointing": True}, "float32"),
    "8bit": ("and 8-bit Adam", EIGHT_BIT, "float32"),
    "least": (
        "8-bit Adam, checkpointing, `autocast`, frozen models in bf16",
        {**EIGHT_BIT, "autocast": "bfloat16", "gradient_checkpointing": True},
        "bfloat16",
    ),
    "lora": ("LoRA, fp32", {"lora": True}, "float32"),
    "lora-checkpointing": ("and `gradient_checkpointing`", {"lora": True, "gradient_checkpointing": True}, "float32"),
    TRL: ("TRL 1.12 PPO, value and reward model of the same size", {}, "float32"),
}
PARTS = ("weights", "gradients", "optimizer", "saved", "logits")
PHASES = ("rollout", "score", "update")


class PeakClock(Clock):
    """Notes the most memory since the last lap in the place of time.

    :param device: ``cpu`` or ``cuda``
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.peaks: dict[str, int] = {}
        super().__init__(device)

    def lap(self, phase: str) -> None:
        super().lap(phase)
        self.peaks[phase] = max(self.peaks.get(phase, 0), of(self.device))
        reset_peak(self.device)


def of(device: str) -> int:
    """Most bytes that counted on a device since :func:`reset_peak`."""
    memory = peak_memory(device)
    return memory.get("allocated", memory["resident"])


def reset_peak(device: str) -> bool:
    """Let the peak begin anew; False where that can't be done."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # see proc(5)
    except OSError:
        return False
    return True


def run(setting: str, workload: Workload, channel: Channel) -> None:
    """One iteration in this process; says what memory it took."""
    import torch
    from ours import Setting, Textgym

    torch.set_num_threads(workload.threads)
    program = of(workload.device)
    _, policy, frozen = SETTINGS[setting]
    policy = dict(policy)
    if "optimizer_class" in policy:
        import bitsandbytes  # type: ignore[import-not-found]

        policy["optimizer_class"] = functools.reduce(getattr, policy["optimizer_class"].split(".")[1:], bitsandbytes)
    contender = Textgym(workload, Setting(policy, frozen))
    whole = reset_peak(workload.device)  # building makes copies of weights that are gone by now
    clock = PeakClock(workload.device)
    contender.iterate(clock)
    parts = counted(contender)
    parts["saved"], parts["logits"] = saved_for_backward(contender)
    peak = max(clock.peaks.values())
    channel.say({"peak": peak, "program": program, "phases": clock.peaks if whole else {}, "parts": parts})


def counted(contender: Any) -> dict[str, int]:
    """Bytes of weights, gradients and the optimizer's state."""
    import torch

    policy = contender.model.policy
    models = [policy, *contender.models()]
    if policy.rollout_dtype is not None:
        models.append(policy.acting_model.model)
    state = [tensor for entry in policy.optimizer.state.values() for tensor in entry.values()]
    return {
        "weights": size(tensor for model in models for tensor in (*model.parameters(), *model.buffers())),
        "gradients": size(p.grad for p in policy.parameters() if p.grad is not None),
        "optimizer": size(tensor for tensor in state if isinstance(tensor, torch.Tensor)),
    }


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the memory behind some tensors; what they share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def saved_for_backward(contender: Any) -> tuple[int, int]:
    """Bytes that the forward of one minibatch keeps for the backward pass: logits, and what isn't logits."""
    import torch

    agent, policy = contender.model, contender.model.policy
    weights = {p.untyped_storage().data_ptr() for model in (policy, *contender.models()) for p in model.parameters()}
    kept: dict[int, tuple[Any, bool]] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and isinstance(tensor, torch.Tensor):
            # Held on to, so that no other tensor gets the same address.
            kept[storage.data_ptr()] = storage, tensor.shape[-1:] == (contender.workload.vocab,)
        return tensor

    batch = next(iter(agent.rollout_buffer.get(agent.batch_size)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = policy.evaluate_segments(batch, agent.ent_coef != 0.0)
    del outputs
    logits = sum(storage.nbytes() for storage, wide in kept.values() if wide)
    return sum(storage.nbytes() for storage, _ in kept.values()) - logits, logits


# The driver


def measured(setting: str, workload: Workload, logs: Path) -> dict[str, Any]:
    """What a process of its own says.

    :raises WorkerError: if it fails
    """
    log = logs / f"{setting}-{workload.vocab}.log"
    if setting == TRL:
        worker = Worker(setting, workload, log)
        worker.iterate()
        memory = worker.stop()
        return {"peak": memory.get("allocated", memory["resident"]), "phases": {}, "parts": {}}
    command = [sys.executable, __file__, "--work", workload.to_json(), "--settings", setting]
    environment = {**os.environ, "OMP_NUM_THREADS": str(workload.threads), "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        raise WorkerError(f"{setting} ended with exit code {done.returncode}:\n  " + "\n  ".join(last))
    message: dict[str, Any] = json.loads(done.stdout)
    return message


def settings_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table in MiB: a line for each setting."""
    lines = [
        "| MiB | " + " | ".join([*PARTS, *(f"peak: {phase}" for phase in PHASES), "peak"]) + " |",
        "|---|" + "---:|" * (len(PARTS) + len(PHASES) + 1),
    ]
    for setting, result in results.items():
        if "failed" in result:
            lines.append(f"| {SETTINGS[setting][0]} | failed: {result['failed'].splitlines()[-1].strip()} |")
            continue
        numbers = [result["parts"].get(part) for part in PARTS] + [result["phases"].get(phase) for phase in PHASES]
        cells = ["" if number is None else f"{number / MIB:,.0f}" for number in [*numbers, result["peak"]]]
        lines.append(f"| {SETTINGS[setting][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def vocabulary_table(results: dict[str, dict[str, dict[str, Any]]], workload: Workload) -> str:
    """A Markdown table in MiB: a line for each vocabulary, the peaks of textgym and TRL and one ``[B, T, V]``."""
    lines = [
        f"| V | one ({workload.rows}, {workload.new_tokens}, V) fp32 | weights, gradients, optimizer | textgym: peak | "
        "TRL: peak |",
        "|---:|" + "---:|" * 4,
    ]
    for vocab, each in results.items():
        one = workload.rows * workload.new_tokens * int(vocab) * 4
        parts = each["full"].get("parts", {})
        numbers = [one, sum(parts.get(part, 0) for part in PARTS[:3]), each["full"].get("peak")]
        numbers.append(each.get(TRL, {}).get("peak"))
        cells = ["" if number is None else f"{number / MIB:,.0f}" for number in numbers]
        lines.append(f"| {int(vocab):,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="135m", help="shape of the models (default %(default)s)")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="with commas between (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="(default %(default)s)")
    parser.add_argument("--minibatches", type=int, default=2, help="of the rows (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="(default %(default)s)")
    parser.add_argument(
        "--vocabularies", default="4096,32768,131072", help="of the second table, with a model 64 x 2 (%(default)s)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/memory"), help="folder for tables, JSON and logs")
    parser.add_argument("--work", type=Workload.from_json, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    parsed.settings = list(dict.fromkeys(parsed.settings.split(",")))
    unknown = [name for name in parsed.settings if name not in SETTINGS]
    if unknown:
        parser.error(f"--settings: {', '.join(unknown)} unknown; there are {', '.join(SETTINGS)}")
    try:
        parsed.vocabularies = [int(number) for number in parsed.vocabularies.split(",") if number]
        parsed.workload = PRESETS[parsed.preset].replace(
            rows=parsed.rows, prompt_tokens=parsed.prompt_tokens, new_tokens=parsed.new_tokens, epochs=1,
            minibatches=parsed.minibatches, device=parsed.device, threads=parsed.threads, compile=False,
        )  # fmt: skip
    except ValueError as e:
        parser.error(str(e))
    return parsed


def main() -> int:
    arguments = parse()
    if arguments.work is not None:
        run(arguments.settings[0], arguments.work, Channel())
        return 0
    workload, logs = arguments.workload, arguments.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    failed = False

    def tried(setting: str, work: Workload) -> dict[str, Any]:
        nonlocal failed
        print(f"{setting}, V = {work.vocab:,} ...", file=sys.stderr, flush=True)
        try:
            return measured(setting, work, logs)
        except WorkerError as error:
            failed = True
            return {"failed": str(error), "phases": {}, "parts": {}}

    results = {setting: tried(setting, workload) for setting in arguments.settings}
    small = PRESETS["135m"].replace(
        hidden=64, layers=2, heads=2, kv_heads=2, mlp=128, rows=32, prompt_tokens=8, new_tokens=64, epochs=1,
        minibatches=4, device=workload.device, threads=workload.threads, compile=False,
    )  # fmt: skip
    both = [name for name in ("full", TRL) if name in arguments.settings]
    by_vocabulary = {
        str(vocab): {name: tried(name, small.replace(vocab=vocab)) for name in both} for vocab in arguments.vocabularies
    }
    text = f"{workload}\n\n{settings_table(results)}\n"
    if by_vocabulary and "full" in both:
        text += f"\n{small} (but for the vocabulary)\n\n{vocabulary_table(by_vocabulary, small)}\n"
    figures = {
        "workload": json.loads(workload.to_json()),
        "settings": results,
        "vocabulary_workload": json.loads(small.to_json()),
        "vocabularies": by_vocabulary,
    }
    (arguments.output / "memory.md").write_text(text, encoding="utf-8")
    (arguments.output / "memory.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(text)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
