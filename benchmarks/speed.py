"""Rollouts against ``transformers.generate``, and the update against Stable-Baselines3's own PPO, in one run.

    make benchmark                                  # or: python benchmarks/speed.py --rounds 7 --threads 2

Everyone does the same work with the same model, a Llama with random weights: ``rows`` prompts, every completion as
long as the budget. The contenders take turns within each round, so that a noisy machine hits all alike, and the table
has medians over the rounds and the ratio to the first contender of each part. Absolute times say little.

*Rollout*: "generate" samples with ``transformers``. "decode" is ``PPO.collect_rollouts`` with a reward that costs
nothing and no KL, which is the same work and the values. "rollout" adds what a rollout is for: the log-probs of a
reference model and the scores of a reward model, both of the same size, deferred or instant (each token is scored
before the next).

*Update*: one epoch of four minibatches on one rollout. "SB3" is ``stable_baselines3.PPO.train`` over single steps with
the same policy: a forward of the whole prefix for every token. "textgym" passes once over each episode. Losses and
gradients of the two are equal (``tests/test_ppo_equals_sb3.py``).
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stable_baselines3 as sb3
import torch
from stable_baselines3.common.logger import Logger
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from textgym.agents import PPO, LanguageModelPolicy
from textgym.embedded import LANGUAGE_MODEL
from textgym.envs import TextGenVectorEnv
from textgym.envs.sb3 import TextGenVecEnv
from textgym.language_model import LanguageModel
from textgym.rewards import CausalRewardModel, FunctionReward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="prompts side by side (default %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5, help="each contender runs once a round; the first is warm-up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of all models")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/benchmark"), help="folder for speed.json and speed.md"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    parts = {"rollout": rollout_contenders(arguments), "update": update_contenders(arguments)}
    seconds: dict[str, dict[str, list[float]]] = {part: {name: [] for name in parts[part]} for part in parts}
    for round_number in range(arguments.rounds + 1):
        for part, contenders in parts.items():
            for name, (prepare, run) in contenders.items():
                prepare()
                synchronize(arguments.device)
                start = time.perf_counter()
                run()
                synchronize(arguments.device)
                if round_number:
                    seconds[part][name].append(time.perf_counter() - start)
    report(arguments, seconds)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# Models and environments


def model_config(arguments: argparse.Namespace, tokenizer: Any, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        max_position_embeddings=arguments.prompt_tokens + arguments.new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def language_model(arguments: argparse.Namespace, tokenizer: Any) -> LanguageModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(arguments, tokenizer)).eval()
    return LanguageModel(model.to(arguments.device, getattr(torch, arguments.dtype)), tokenizer, "random Llama")


def reward_model(arguments: argparse.Namespace, tokenizer: Any) -> CausalRewardModel:
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(model_config(arguments, tokenizer, num_labels=1)).eval()
    return CausalRewardModel(model.to(arguments.device, getattr(torch, arguments.dtype)), tokenizer)


def nothing(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def prompts_of(arguments: argparse.Namespace, tokenizer: Any) -> list[str]:
    """Prompts of exactly so many tokens, the begin-of-sequence token among them."""
    generator = torch.Generator().manual_seed(0)
    whole_words = [i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i).lstrip("▁").isalpha()]
    texts: list[str] = []
    while len(texts) < arguments.rows:
        chosen = torch.randint(len(whole_words), (arguments.prompt_tokens - 1,), generator=generator).tolist()
        text = tokenizer.decode([whole_words[i] for i in chosen])
        if len(tokenizer(text)["input_ids"]) == arguments.prompt_tokens:
            texts.append(text)
    return texts


def agent(arguments: argparse.Namespace, tokenizer: Any, scoring: str, **options: Any) -> PPO:
    lm = language_model(arguments, tokenizer)
    envs = TextGenVectorEnv(
        arguments.rows,
        language_model=lm,
        prompts=prompts_of(arguments, tokenizer),
        max_new_tokens=arguments.new_tokens,
        min_new_tokens=arguments.new_tokens,  # the end-of-sequence token ends nothing: the whole budget is used
        max_prompt_tokens=arguments.prompt_tokens,
        **options,
    )
    model = PPO(
        "LanguageModelPolicy",
        envs,
        n_steps=arguments.new_tokens,
        batch_size=arguments.rows * arguments.new_tokens // 4,
        n_epochs=1,
        scoring=scoring,
        seed=0,
        device=arguments.device,
        policy_kwargs={"language_model": lm},
    )
    model.set_logger(Logger(None, []))
    return model


# Contenders: what to do before the clock runs, and what is measured


Contender = tuple[Callable[[], Any], Callable[[], Any]]


def rollout_contenders(arguments: argparse.Namespace) -> dict[str, Contender]:
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    lm = language_model(arguments, tokenizer)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in prompts_of(arguments, tokenizer)]).to(arguments.device)
    sampling = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=arguments.new_tokens,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )

    def generate() -> None:
        with torch.inference_mode():
            out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=sampling)
        assert out.shape[1] == arguments.prompt_tokens + arguments.new_tokens

    def rollout_of(model: PPO) -> Contender:
        callback = model._setup_learn(10**9)[1]

        def run() -> None:
            model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)

        return (lambda: None), run

    reward = reward_model(arguments, tokenizer)
    return {
        "generate (transformers)": ((lambda: None), generate),
        "decode: policy and values": rollout_of(
            agent(arguments, tokenizer, "auto", reward=FunctionReward(nothing), reward_every="end", kl_coef=0.0)
        ),
        "rollout, deferred scoring": rollout_of(agent(arguments, tokenizer, "deferred", reward=reward, kl_coef=0.05)),
        "rollout, instant scoring": rollout_of(agent(arguments, tokenizer, "instant", reward=reward, kl_coef=0.05)),
    }


def update_contenders(arguments: argparse.Namespace) -> dict[str, Contender]:
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_MODEL)
    ours = agent(arguments, tokenizer, "deferred", reward=reward_model(arguments, tokenizer), kl_coef=0.05)
    callback = ours._setup_learn(10**9)[1]
    ours.collect_rollouts(ours.env, callback, ours.rollout_buffer, ours.n_steps)
    assert isinstance(ours.env, TextGenVecEnv)
    theirs = sb3.PPO(
        LanguageModelPolicy,
        ours.env,
        learning_rate=ours.learning_rate,
        n_steps=ours.n_steps,
        batch_size=ours.batch_size,
        n_epochs=1,
        vf_coef=ours.vf_coef,
        max_grad_norm=ours.max_grad_norm,
        policy_kwargs={"language_model": ours.policy.language_model},
        device=arguments.device,
    )
    theirs.policy = copy.deepcopy(ours.policy)
    theirs.rollout_buffer = ours.rollout_buffer.as_single_steps()  # type: ignore[assignment]
    theirs.set_logger(Logger(None, []))
    start = copy.deepcopy(ours.policy.state_dict())

    def restored(model: Any) -> Callable[[], None]:
        return lambda: model.policy.load_state_dict(start)

    return {
        "SB3 PPO over prefixes": (restored(theirs), theirs.train),
        "textgym PPO over episodes": (restored(ours), ours.train),
    }


# The table


def report(arguments: argparse.Namespace, seconds: dict[str, dict[str, list[float]]]) -> None:
    tokens = arguments.rows * arguments.new_tokens
    lines = [
        f"{arguments.rows} rows, {arguments.prompt_tokens} + {arguments.new_tokens} tokens, Llama {arguments.hidden} x "
        f"{arguments.layers}, {arguments.dtype}, {arguments.device}, {arguments.threads} threads; medians of "
        f"{arguments.rounds} interleaved rounds",
        "",
        "| | seconds | tokens/s | times as fast |",
        "|---|---:|---:|---:|",
    ]
    figures: dict[str, Any] = {}
    for part, contenders in seconds.items():
        medians = {name: statistics.median(values) for name, values in contenders.items()}
        first = next(iter(medians.values()))
        for name, median in medians.items():
            lines.append(f"| {part}: {name} | {median:.3f} | {tokens / median:,.0f} | {first / median:.2f} |")
        figures[part] = {
            name: {"seconds": contenders[name], "median": median, "tokens_per_second": tokens / median,
                   "ratio": first / median}
            for name, median in medians.items()
        }  # fmt: skip
    table = "\n".join(lines)
    print(table)
    arguments.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    result = {"settings": settings, "torch": torch.__version__, "python": platform.python_version(), **figures}
    (arguments.output / "speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (arguments.output / "speed.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
