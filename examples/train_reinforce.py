"""REINFORCE on a reward that only a finished text has: is the number of words the one that was asked for?

With ``reward_every="end"`` the reward is called once for each text, and pays what it returns. Nothing bootstraps, so
there is no value function that has to be right first.

    python examples/train_reinforce.py          # or with a budget of tokens: python examples/train_reinforce.py 24576
"""

import sys

import gymnasium as gym

from textgym.agents import REINFORCE

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 8_192
PROMPTS = [{"prompt": prompt, "words": 6} for prompt in ("the film is", "this story", "the actors are", "a movie that")]


def right_length(prompts, completions, words, **columns):
    """1 for as many words as the prompt's column says, less for each that is missing or too many."""
    lengths = [len(completion.split()) for completion in completions]
    return [max(0.0, 1 - abs(length - wanted) / wanted) for length, wanted in zip(lengths, words, strict=True)]


envs = gym.make_vec(
    "TextGen-v0", num_envs=32, prompts=PROMPTS, reward=right_length, reward_every="end", max_new_tokens=16, kl_coef=0.02
)
model = REINFORCE("LanguageModelPolicy", envs, baseline="mean", learning_rate=3e-4, seed=0)
model.learn(TOKENS)
for text in model.policy.generate([row["prompt"] for row in PROMPTS], seed=0):
    print(len(text.split()), "words:", text)
