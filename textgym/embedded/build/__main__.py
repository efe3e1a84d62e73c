"""Build the embedded models from their sources.

    python -m textgym.embedded.build                       # everything that is not built yet
    python -m textgym.embedded.build language_model pack   # some stages, in this order
    python -m textgym.embedded.build --samples 60 --language-passes 4

Stages keep what they made under ``.cache/assets`` and are skipped while it exists: delete a stage's folder
there to build it anew. ``pack`` moves the results into the package, one folder at a time. Needs the extra
packages of the development install (gguf, scikit-learn), pip and npm as the ordinary clients, some 3 GB of
memory, and some three hours on two cores for the defaults.

The language model that ships came about in more steps than the defaults: a first ``distilled_model`` learned from 53
files of samples, the next from 103, and the mean of the two was ``distilled_model`` for what followed. ``mixed_model``
began from a float16 copy of the averaged model, on a CPU without bfloat16.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from . import (
    distillation,
    judge,
    language_model,
    mixture,
    prompts,
    report,
    reward_model,
    sentiment_teacher,
    teacher,
    tokenizer,
)
from .sources import CACHE, movie_snippets

ASSETS = Path(__file__).resolve().parents[1]
# what is shipped, and the stages that make it: the first that has been built
PACKED = {
    "language_model": ("mixed_model", "averaged_model", "distilled_model", "language_model"),
    "reward_model": ("hardened_reward_model", "reward_model"),
    "prompts": ("prompts",),
    "judge": ("judge",),
}


def build_tokenizer() -> None:
    tokenizer.train(language_model.real_snippets() * 3 + language_model.clean_samples(files=8))


def pack(assets: Path = ASSETS) -> None:
    """Put the built folders in the place of the packaged ones; a reader never sees a folder half written."""
    for name, stages in PACKED.items():
        source = next((CACHE / stage for stage in stages if (CACHE / stage).exists()), None)
        if source is None:
            print(f"pack: {name} is not built and stays as it is", flush=True)
            continue
        with tempfile.TemporaryDirectory(dir=assets, prefix=".pack-") as temporary:
            fresh = Path(temporary) / "new"
            shutil.copytree(source, fresh, ignore=shutil.ignore_patterns("seconds.json", "training_args.bin"))
            if (assets / name).exists():
                os.rename(assets / name, Path(temporary) / "old")
            for path in fresh.rglob("*"):
                path.chmod(0o644)
            os.rename(fresh, assets / name)
    print("pack: done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="default: all")
    parser.add_argument("--samples", type=int, default=150, help="files of some 1,000 snippets that the teacher writes")
    parser.add_argument("--language-passes", type=float, default=8.0, help="over the training text")
    parser.add_argument("--soft-passes", type=float, default=5.0, help="the same, with soft labels")
    parser.add_argument("--mixture-steps", type=int, default=1000, help="batches for the mixture of two manners")
    parser.add_argument("--trunk-passes", type=float, default=3.0, help="the same, for the reward model's trunk")
    parser.add_argument("--reward-steps", type=int, default=3000, help="batches for the reward model")
    parser.add_argument("--hardening-steps", type=int, default=1000, help="the same, with more broken texts")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stages: dict[str, Callable[[], object]] = {
        "sources": movie_snippets,
        "teacher": teacher.tune,
        "samples": lambda: teacher.write_samples(options.samples),
        "sentiment_teacher": sentiment_teacher.tune,
        "tokenizer": build_tokenizer,
        "general_model": language_model.pretrain,
        "language_model": lambda: language_model.build(options.language_passes),
        "soft_labels": distillation.build,
        "distilled_model": lambda: distillation.distil(options.soft_passes, "language_model", "distilled_model"),
        "distilled_again": lambda: distillation.distil(
            options.soft_passes / 3, "distilled_model", "distilled_again", seed=1, learning_rate=8e-4
        ),
        "averaged_model": lambda: distillation.average("distilled_model", "distilled_again", "averaged_model"),
        "mixed_model": lambda: mixture.build(options.mixture_steps),
        "reward_model": lambda: reward_model.build(options.trunk_passes, options.reward_steps),
        "hardened_reward_model": lambda: reward_model.harden(options.hardening_steps),
        "prompts": lambda: prompts.build(CACHE / "prompts"),
        "judge": lambda: judge.build(CACHE / "judge"),
        "pack": pack,
        "report": lambda: report.write(ASSETS),
    }
    unknown = [stage for stage in options.stages if stage not in stages]
    if unknown:
        parser.error(f"unknown stages {unknown}; choose from {list(stages)}")
    for stage in options.stages or stages:
        print(f"stage {stage}", flush=True)
        stages[stage]()


if __name__ == "__main__":
    main()
