"""``python -m textgym.hyperparams ppo`` prints where the hyperparameters of an algorithm are."""

from __future__ import annotations

import argparse

from textgym.hyperparams import ALGORITHMS, hyperparams_file

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m textgym.hyperparams", description=__doc__)
    parser.add_argument("algorithm", choices=ALGORITHMS, help="as rl_zoo3 calls it")
    print(hyperparams_file(parser.parse_args().algorithm))
