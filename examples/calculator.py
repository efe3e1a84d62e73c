"""A tool: the policy learns to ask a calculator. python examples/calculator.py 65536  # tokens to train on"""

import random
import sys

import gymnasium as gym

from textgym.agents import PPO, warm_start
from textgym.replies import ToolReply, calculate
from textgym.small_model import small_model

TAGS = ["<calculate>", "</calculate>", "<result>", "</result>"]


def questions(count, seed):
    """Such as "12+07+90=", with their answers."""
    draws = random.Random(seed)
    sums = [draws.choices(range(1, 100), k=3) for _ in range(count)]
    return [{"prompt": "+".join(f"{n:02}" for n in three) + "=", "answer": f"{sum(three)}."} for three in sums]


def right(transcripts, answer):
    return [float(bool(talk) and talk[-1]["content"] == text) for talk, text in zip(transcripts, answer, strict=True)]


def lessons(prompt, answer):
    """An answer at random, now and then a call instead; and how calls and results are written."""
    call = f"{TAGS[0]}{prompt[:-1]}{TAGS[1]}"
    yield {"prompt": prompt, "completion": call if random.random() < 0.15 else f"{random.randint(3, 297)}."}
    yield {"prompt": prompt + TAGS[0], "completion": prompt[:-1] + TAGS[1]}
    yield {"prompt": f"{prompt}{call}{TAGS[2]}{answer[:-1]}{TAGS[3]}", "completion": answer}


def beginner():
    random.seed(0)
    model = small_model([*map(chr, range(32, 127)), *TAGS], hidden_size=96)
    rows = [row for question in questions(5000, seed=1) for row in lessons(**question)]
    return warm_start(model, rows, epochs=5, learning_rate=4e-3, batch_size=128).language_model


def environment(model, **options):
    limits = {"max_turns": 3, "max_new_tokens": 12, "max_reply_tokens": 40, "stop": [".", TAGS[1]], "kl_coef": 0.05}
    talk = {"num_envs": 64, "prompts": questions(3000, seed=2), "reply": ToolReply({"calculate": calculate}), **limits}
    return gym.make_vec("TextGen-v0", language_model=model, reward=right, **(talk | options))


def main(tokens):
    settings = {"n_steps": 64, "batch_size": 1024, "learning_rate": lambda left: 2e-4 * left}
    model = PPO("LanguageModelPolicy", environment(beginner()), seed=0, **settings)
    for budget in (1, tokens):
        sums = model.learn(budget, progress_bar=True).finished_episodes
        share, last = sum(s["score"] for s in sums) / len(sums), sums[-1]["completion"].split("\n")
        print(f"{model.num_timesteps} tokens: {share:.0%} right, such as {sums[-1]['prompt']}", *last)


if __name__ == "__main__":
    main(int(sys.argv[1]))
