"""Train a language model with RLOO: completions of one prompt compared with each other, and no critic.

    python examples/train_rloo.py --help
    python examples/train_rloo.py --group-size 8 --credit token --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train rloo``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("rloo")
