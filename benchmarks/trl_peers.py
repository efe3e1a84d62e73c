"""TRL's trainers as contenders: PPO of 1.12.0, the last release that has it, GRPO and RLOO of 1.16.0.

They run as they come, in a virtual environment of their own. The trainer owns the loop, so the wait for the driver and
the clock's laps hang on its callbacks and on the functions it calls.

GRPO and RLOO have no critic and draw groups of completions for each prompt; otherwise the work is the same.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from datasets import Dataset
from measures import Channel, Clock
from transformers import TrainerCallback
from workload import GROUP, Workload, language_model, prompt_ids, prompt_texts, real_tokens, scalar_model, tokenizer

ITERATIONS = 100_000  # more than anybody asks for; the learning rate falls to 0 over them
PROMPTS = 256


class Stopped(Exception):
    """The driver wants no more iterations."""


class Gate(TrainerCallback):
    """Waits for the driver between iterations, and answers it after each.

    :param steps: of the trainer's own counting, in an iteration
    """

    def __init__(self, channel: Channel, clock: Clock, steps: int, versions: dict[str, str]) -> None:
        self.channel, self.clock, self.steps, self.versions = channel, clock, steps, versions
        self.tokens = 0

    def wait(self) -> None:
        if not self.channel.wait_for_go():
            raise Stopped
        self.clock.start()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.channel.ready(("rollout", "score", "update"), **self.versions)
        self.wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self.clock.lap("update")
            self.channel.answer(self.clock, tokens=self.tokens)
            self.wait()


def run(name: str, workload: Workload, channel: Channel) -> None:
    """Train until the driver says stop."""
    import trl

    transformers.logging.set_verbosity_error()
    clock = Clock(workload.device)
    with tempfile.TemporaryDirectory(prefix="benchmark_trl_") as folder, contextlib.suppress(Stopped):
        run_ppo_or_group = run_ppo if name == "trl-ppo" else run_group
        run_ppo_or_group(name, workload, channel, clock, folder, {"trl": trl.__version__})


def common_arguments(workload: Workload, folder: str) -> dict[str, Any]:
    """Of all trainers: nothing but training. With bf16 the weights are fp32 and computed with under autocast."""
    return {
        "output_dir": folder,
        "use_cpu": workload.device == "cpu",
        "bf16": workload.dtype == "bfloat16",
        "fp16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": workload.lr,
        "seed": 0,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "temperature": 1.0,
    }


def run_ppo(
    name: str, workload: Workload, channel: Channel, clock: Clock, folder: str, versions: dict[str, str]
) -> None:
    import trl.experimental.ppo.ppo_trainer as ppo
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words, gate = tokenizer(workload), Gate(channel, clock, 1, versions)
    arguments = PPOConfig(
        per_device_train_batch_size=workload.rows,
        gradient_accumulation_steps=1,
        num_mini_batches=workload.minibatches,
        num_ppo_epochs=workload.epochs,
        total_episodes=workload.rows * ITERATIONS,
        response_length=workload.new_tokens,
        kl_coef=workload.kl_coef,
        stop_token="eos" if workload.ragged else None,
        num_sample_generations=0,
        local_rollout_forward_batch_size=workload.rows,
        **common_arguments(workload, folder),
    )
    trainer = PPOTrainer(
        args=arguments,
        processing_class=words,
        model=language_model(workload),
        ref_model=language_model(workload),
        reward_model=scalar_model(workload, seed=1),
        value_model=scalar_model(workload, seed=2),
        train_dataset=Dataset.from_dict({"input_ids": prompt_ids(workload, PROMPTS)}),
        callbacks=[gate],
    )
    generation, forward = ppo.batch_generation, ppo.forward
    scoring = False

    def timed_generation(*args: Any, **kwargs: Any) -> Any:
        nonlocal scoring
        result = generation(*args, **kwargs)
        clock.lap("rollout")
        responses = result[0][:, workload.prompt_tokens :]
        gate.tokens = real_tokens(responses) if workload.ragged else responses.numel()
        scoring = True
        return result

    def timed_forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal scoring
        if scoring and model is trainer.model:  # the first of the update
            clock.lap("score")
            scoring = False
        return forward(model, *args, **kwargs)

    ppo.batch_generation, ppo.forward = timed_generation, timed_forward
    trainer.train()


def run_group(
    name: str, workload: Workload, channel: Channel, clock: Clock, folder: str, versions: dict[str, str]
) -> None:
    import trl

    trainer_class, config_class = {
        "trl-grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "trl-rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[name]
    words, model = tokenizer(workload), language_model(workload)
    # The reference model is opened from where the configuration says that the model came from.
    with silent_progress():
        model.save_pretrained(folder)
    words.save_pretrained(folder)
    model.config._name_or_path = folder
    steps = workload.epochs * workload.minibatches
    gate = Gate(channel, clock, steps, versions)
    arguments = config_class(
        per_device_train_batch_size=workload.rows // workload.minibatches,
        gradient_accumulation_steps=1,
        steps_per_generation=workload.minibatches,
        num_iterations=workload.epochs,
        num_generations=math.gcd(GROUP, workload.rows),  # must divide them
        max_completion_length=workload.new_tokens,
        generation_kwargs={} if workload.ragged else {"min_new_tokens": workload.new_tokens},
        beta=workload.kl_coef,
        max_steps=steps * ITERATIONS,
        **common_arguments(workload, folder),
    )
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompt_texts(workload, PROMPTS)}),
        processing_class=words,
        reward_funcs=scalar_model(workload),
        reward_processing_classes=words,
        callbacks=[gate],
    )
    trainer._generate = then(trainer._generate, lambda: clock.lap("rollout"))
    score = trainer._generate_and_score_completions

    def timed_score(*args: Any, **kwargs: Any) -> Any:
        batch = score(*args, **kwargs)
        clock.lap("score")
        gate.tokens = int(batch["completion_mask"].sum())
        return batch

    trainer._generate_and_score_completions = timed_score
    trainer.train()


def then(function: Callable[..., Any], what: Callable[[], None]) -> Callable[..., Any]:
    """The function, and something after it."""

    def both(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        what()
        return result

    return both


@contextlib.contextmanager
def silent_progress() -> Iterator[None]:
    """Without transformers' progress bars."""
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
