"""Train a language model with TRPO: sb3-contrib's update within a KL bound (``pip install "textgym[contrib]"``).

    python examples/train_trpo.py --help
    python examples/train_trpo.py --rows 16 --target-kl 0.01 --output runs/mine

Everything else is as in train_ppo.py; it is the same code as the command ``textgym train trpo``.
"""

from textgym.agents.cli import train_script

if __name__ == "__main__":
    train_script("trpo")
