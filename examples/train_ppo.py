"""PPO: every token earns the change it makes to the predicted sentiment of a film review. Half a minute on two cores.

python examples/train_ppo.py          # or with a budget of tokens: python examples/train_ppo.py 49152
"""

import sys

import gymnasium as gym

from textgym.agents import PPO

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 12_288
PROMPTS = ["the film is", "this story", "the actors are", "a movie that"]

# 32 texts are written side by side. The model, the prompts and the reward are the embedded ones.
envs = gym.make_vec("TextGen-v0", num_envs=32, max_new_tokens=24, min_new_tokens=8, kl_coef=0.05)
model = PPO("LanguageModelPolicy", envs, n_steps=24, batch_size=256, learning_rate=2e-4, seed=0)

before = model.policy.generate(PROMPTS, seed=1)
model.learn(TOKENS)
after = model.policy.generate(PROMPTS, seed=1)
for prompt, old, new in zip(PROMPTS, before, after, strict=True):
    print(f"{prompt} ...\n  before:{old}\n  after: {new}")
last = model.finished_episodes  # those that ended in the last rollout
print(f"score {sum(episode['score'] for episode in last) / len(last):+.2f}, at most 1")
