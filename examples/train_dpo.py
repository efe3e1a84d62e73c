"""Train a language model with DPO: the best of several completions of a prompt against the worst.

    python examples/train_dpo.py --help
    python examples/train_dpo.py --group-size 4 --beta 0.1 --no-offline --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train dpo``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("dpo")
