"""Q-learning: explore less and less, then take the token of which Q is largest.

python examples/train_q.py          # or with a budget of tokens: python examples/train_q.py 24576
"""

import sys

import gymnasium as gym
from stable_baselines3.common.utils import LinearSchedule

from textgym.agents import QLearning

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 6_144

envs = gym.make_vec("TextGen-v0", num_envs=16, max_new_tokens=12, kl_coef=0.02)
model = QLearning(
    "LanguageModelPolicy",
    envs,
    epsilon=LinearSchedule(1.0, 0.2, 1.0),  # share of the tokens that explore, from all to a fifth
    gradient_steps=4,
    learning_rate=1e-4,
    seed=0,
)
model.learn(TOKENS)
for prompt in ("the film is", "this story"):
    print(prompt + model.policy.generate([prompt], deterministic=True)[0])  # the greedy text
