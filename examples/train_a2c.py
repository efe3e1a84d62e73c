"""A2C on a reward of one's own: one step on each rollout, which is the cheapest way to try a reward out.

python examples/train_a2c.py          # or with a budget of tokens: python examples/train_a2c.py 24576
"""

import sys

import gymnasium as gym

from textgym.agents import A2C

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 8_192


def short_words(prompts, completions, **columns):
    """Share of words of at most four letters; fewer than six words earn less, so that one word is not the best text."""
    texts = [completion.split() for completion in completions]
    return [sum(len(word) <= 4 for word in words) / max(len(words), 6) for words in texts]


envs = gym.make_vec("TextGen-v0", num_envs=32, reward=short_words, max_new_tokens=16, kl_coef=0.05)
model = A2C("LanguageModelPolicy", envs, n_steps=16, learning_rate=3e-4, normalize_advantage="rollout", seed=0)
for part in range(4):  # learn goes on where it was
    model.learn(TOKENS // 4, reset_num_timesteps=part == 0)
    last = model.finished_episodes
    print(f"{model.num_timesteps:6,} tokens: reward {sum(episode['score'] for episode in last) / len(last):.2f}")
print(model.policy.generate(["the film is"], seed=0)[0])
