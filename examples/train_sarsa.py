"""SARSA where it is strongest: few tokens to choose from, and each of them is paid for. The reward counts letters.

``top_k=20`` leaves the twenty likeliest tokens of the reference model, so that Q can be tried out.

    python examples/train_sarsa.py          # or with a budget of tokens: python examples/train_sarsa.py 24576
"""

import sys

import gymnasium as gym

from textgym.agents import SARSA

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 8_192


def letters_e(prompts, completions, **columns):
    """Share of the letter e among the letters; fewer than 30 letters earn less."""
    return [text.count("e") / max(sum(map(str.isalpha, text)), 30) for text in completions]


envs = gym.make_vec(
    "TextGen-v0", num_envs=16, reward=letters_e, max_new_tokens=12, action_masking=True, top_k=20, kl_coef=0.001
)
model = SARSA("LanguageModelPolicy", envs, q_temperature=0.01, learning_rate=1e-3, seed=0)
for part in range(4):
    model.learn(TOKENS // 4, reset_num_timesteps=part == 0)
    last = model.finished_episodes
    print(f"{model.num_timesteps:6,} tokens: share of e {sum(episode['score'] for episode in last) / len(last):.3f}")
print(model.policy.generate(["the film is"], seed=0)[0])
