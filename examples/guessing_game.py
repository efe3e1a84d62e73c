"""A guessing game: the player learns to search. python examples/guessing_game.py 131072  # tokens to train on"""

import math
import random
import sys

import gymnasium as gym

from textgym.agents import PPO, warm_start
from textgym.replies import ReplyResult
from textgym.small_model import small_model

GUESSES = [f" {number}." for number in range(16)]


def hint(turn, secret):
    guess = GUESSES.index(turn) if turn in GUESSES else -1
    return " right." if guess == secret else " higher." if guess < secret else " lower."


def game(transcripts, secret):
    return [ReplyResult(x, done=x == " right.") for x in map(hint, (t[-1]["content"] for t in transcripts), secret)]


def knowledge(transcripts):
    """Minus the bits that are left to find (how many numbers explain all hints?); 1 for the number, -0.1 a guess."""
    talks = [[(a["content"], b["content"]) for a, b in zip(t[::2], t[1::2], strict=False)] for t in transcripts]
    left = [sum(all(hint(turn, n) == said for turn, said in talk) for n in range(16)) for talk in talks]
    return [(" right." in dict(t).values()) - math.log2(n) - 0.1 * len(t) for t, n in zip(talks, left, strict=True)]


def random_game():
    *before, last = random.choices(GUESSES, k=random.randint(1, 6))
    secret = random.randrange(16)
    return {"prompt": "guess:" + "".join(turn + hint(turn, secret) for turn in before), "completion": last}


def beginner():
    random.seed(0)
    model = small_model([*(turn[:-1] for turn in GUESSES), ".", "guess:", " right.", " higher.", " lower."])
    return warm_start(model, [random_game() for _ in range(2000)], learning_rate=2e-3, batch_size=64).language_model


def environment(model, **options):
    rules = {"max_turns": 10, "max_new_tokens": 2, "max_reply_tokens": 1, "stop": ".", "kl_coef": 0.0, "num_envs": 64}
    rules |= {"prompts": [{"prompt": "guess:", "secret": secret} for secret in range(16)], **options}
    return gym.make_vec("TextGen-v0", language_model=model, reward=knowledge, reply=game, **rules)


def main(tokens):
    settings = {"n_steps": 32, "batch_size": 1024, "learning_rate": lambda left: 3e-3 * left, "gae_lambda": 0.7}
    model = PPO("LanguageModelPolicy", environment(beginner()), seed=0, **settings)
    for budget in (1, tokens):
        games = [e["completion"].split("\n") for e in model.learn(budget, progress_bar=True).finished_episodes]
        print(f"{model.num_timesteps} tokens: {sum(map(len, games)) / len(games):.2f} guesses, such as", *games[-1])


if __name__ == "__main__":
    main(int(sys.argv[1]))
