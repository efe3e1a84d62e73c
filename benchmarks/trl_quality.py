"""TRL's trainers on the work of ``time_to_quality.py``, which starts this file in an environment that has TRL.

    python benchmarks/trl_quality.py [--trl-path FOLDER] TRAINER RATE SEED SECONDS FOLDER

The folder has the models ``policy`` and ``reward`` and the prompts, and gets the snapshots. The reward is what textgym
pays for a whole text: tanh of the reward model's score. All else is TRL's default, but for what both sides share:
64 rows, groups of 8, fp32, temperature 1, and PPO's KL coefficient of 0.05.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

ROWS, NEW_TOKENS, GROUP, EVERY = 64, 24, 8, 3.0
FOREVER = 100_000  # the learning rate falls to 0 over so many steps: here it hardly does


class Enough(Exception):
    """The time is used up."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trl-path")
    parser.add_argument("trainer", choices=("trl-ppo", "trl-grpo", "trl-rloo"))
    parser.add_argument("rate", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.trl_path:
        sys.path.insert(0, arguments.trl_path)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with contextlib.suppress(Enough):
        (train_ppo if arguments.trainer == "trl-ppo" else train_group)(arguments)


def models(folder: Path) -> tuple[Any, Any, Any]:
    """The policy, a reward model whose score ends in tanh, and their tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32)
    reward.score = torch.nn.Sequential(reward.score, torch.nn.Tanh())
    words = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    return policy, reward.eval(), words


def watch(policy: Any, arguments: argparse.Namespace, count: Any) -> Any:
    """A callback that takes snapshots after steps."""
    from time_to_quality import Snapshots
    from transformers import TrainerCallback

    snapshots = Snapshots(arguments.folder, EVERY)

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            snapshots.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if snapshots.look(policy.state_dict(), count()) >= arguments.seconds:
                raise Enough

    return Watch()


def common(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(arguments.folder / "trl"), "use_cpu": True, "bf16": False, "fp16": False, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "learning_rate": arguments.rate,
        "seed": arguments.seed, "gradient_checkpointing": False, "dataloader_pin_memory": False, "temperature": 1.0,
        "per_device_train_batch_size": ROWS,
    }  # fmt: skip


def train_ppo(arguments: argparse.Namespace) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reward, words = models(arguments.folder)
    reference, _, _ = models(arguments.folder)
    critic = AutoModelForSequenceClassification.from_pretrained(arguments.folder / "reward", dtype=torch.float32)
    prompts = json.loads((arguments.folder / "prompts.json").read_text(encoding="utf-8"))
    settings = PPOConfig(
        num_mini_batches=4, total_episodes=ROWS * FOREVER, response_length=NEW_TOKENS, kl_coef=0.05, stop_token="eos",
        num_sample_generations=0, local_rollout_forward_batch_size=ROWS, **common(arguments),
    )  # fmt: skip
    trainer = PPOTrainer(
        args=settings, processing_class=words, model=policy, ref_model=reference, reward_model=reward,
        value_model=critic, train_dataset=Dataset.from_dict({"input_ids": [words(p)["input_ids"] for p in prompts]}),
    )  # fmt: skip
    trainer.add_callback(watch(policy, arguments, lambda: trainer.state.episode * NEW_TOKENS))
    trainer.train()


def train_group(arguments: argparse.Namespace) -> None:
    import torch
    import trl
    from datasets import Dataset

    policy, reward, words = models(arguments.folder)
    # The reference model is opened from where the configuration says that the model came from.
    policy.config._name_or_path = str(arguments.folder / "policy")
    prompts = json.loads((arguments.folder / "prompts.json").read_text(encoding="utf-8"))

    def scores(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        with torch.no_grad():
            return [float(score) for score in reward(**words(texts, padding=True, return_tensors="pt")).logits[:, 0]]

    trainer_class, config_class, own = {
        "trl-grpo": (trl.GRPOTrainer, trl.GRPOConfig, {"beta": 0.02}),
        "trl-rloo": (trl.RLOOTrainer, trl.RLOOConfig, {"beta": 0.05}),
    }[arguments.trainer]
    settings = config_class(
        gradient_accumulation_steps=1, steps_per_generation=1, num_generations=GROUP,
        max_completion_length=NEW_TOKENS, max_steps=FOREVER, **own, **common(arguments),
    )  # fmt: skip
    trainer = trainer_class(
        model=policy, args=settings, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=words,
        reward_funcs=scores,
    )  # fmt: skip
    trainer.add_callback(watch(policy, arguments, lambda: int(trainer.state.global_step) * ROWS * NEW_TOKENS))
    trainer.train()


if __name__ == "__main__":
    main()
