"""Train a language model with expert iteration: the best of several completions of a prompt are imitated.

    python examples/train_expert.py --help
    python examples/train_expert.py --group-size 8 --keep 1 --quantile 0.5 --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train expert``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("expert")
