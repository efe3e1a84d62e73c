"""Soft Q-learning: the language model is its own Q-function, and every text is learned from several times.

python examples/train_softq.py          # or with a budget of tokens: python examples/train_softq.py 24576
"""

import sys

import gymnasium as gym

from textgym.agents import SoftQLearning

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 6_144

# kl_coef is the temperature of its policy: the smaller it is, the surer the best token.
envs = gym.make_vec("TextGen-v0", num_envs=16, max_new_tokens=16, kl_coef=0.05)
model = SoftQLearning("LanguageModelPolicy", envs, replay_episodes=500, gradient_steps=4, learning_rate=1e-4, seed=0)
model.learn(TOKENS)
last = model.finished_episodes
print(f"score of the last round {sum(episode['score'] for episode in last) / len(last):+.2f}")
print(model.policy.generate(["the film is", "this story"], seed=0))
