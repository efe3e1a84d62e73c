"""RLOO with credit by token: each token is judged by what it and its successors earn, against the prompt's other texts.

There is no value head to learn: the baseline is the other completions of the same prompt.

    python examples/train_rloo.py          # or with a budget of tokens: python examples/train_rloo.py 24576
"""

import sys

import gymnasium as gym

from textgym.agents import RLOO

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 8_192

envs = gym.make_vec("TextGen-v0", num_envs=32, max_new_tokens=16, kl_coef=0.05)
model = RLOO("LanguageModelPolicy", envs, group_size=4, credit="token", learning_rate=3e-4, seed=0)
model.learn(TOKENS)

groups: dict[str, list[float]] = {}
for episode in model.finished_episodes:  # of the last round: four completions of each of eight prompts
    groups.setdefault(episode["prompt"], []).append(episode["score"])
for prompt, scores in groups.items():
    print(f"{prompt:>40} ...", " ".join(f"{score:+.2f}" for score in sorted(scores)))
