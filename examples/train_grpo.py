"""GRPO on a reward that can be checked: does the text have the word that its prompt asks for?

python examples/train_grpo.py          # or with a budget of tokens: python examples/train_grpo.py 49152
"""

import sys

import gymnasium as gym

from textgym.agents import GRPO

TOKENS = int(sys.argv[1]) if len(sys.argv) > 1 else 12_288
WORDS = ["story", "cast", "music", "heart"]
PROMPTS = [{"prompt": prompt, "word": word} for prompt in ("the film is", "this movie has", "it is") for word in WORDS]


def has_word(prompts, completions, word, **columns):
    """1 for the word in the first place, 0.9 in the second, and so on; 0 for a text without it."""
    texts = [completion.strip(" .").split() for completion in completions]
    return [
        1 - 0.1 * words.index(wanted) if wanted in words else 0.0 for words, wanted in zip(texts, word, strict=True)
    ]


# Eight completions of each prompt are compared; the KL to the reference is in the loss, as in the paper.
envs = gym.make_vec("TextGen-v0", num_envs=32, prompts=PROMPTS, reward=has_word, max_new_tokens=12, kl_coef=0.0)
model = GRPO(
    "LanguageModelPolicy", envs, group_size=8, n_epochs=2, batch_size=128, kl_loss_coef=0.04, learning_rate=2e-4, seed=0
)
model.learn(TOKENS)
last = model.finished_episodes
print(f"{sum(episode['score'] > 0 for episode in last)} of {len(last)} texts have the word")
