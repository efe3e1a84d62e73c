"""Hyperparameters for RL Baselines3 Zoo (``rl_zoo3``): one YAML file for each of its algorithms that was tried here.

The zoo takes a file's path, which ``python -m textgym.hyperparams ppo`` prints::

    python -m rl_zoo3.train --algo ppo --env TextGen-v0 --gym-packages textgym \\
        --conf-file "$(python -m textgym.hyperparams ppo)"

For textgym's own agent there is :mod:`textgym.agents.cli.zoo`, which finds its file by itself.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
ALGORITHMS = tuple(sorted(path.stem for path in FOLDER.glob("*.yml")))


def hyperparams_file(algorithm: str) -> Path:
    """The YAML file of an algorithm, as the zoo calls it: ``"ppo"`` (stock) or ``"textgym_ppo"`` (ours).

    >>> hyperparams_file("ppo").name
    'ppo.yml'

    :raises ValueError: if there is none
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} has no hyperparameter file; there are {', '.join(ALGORITHMS)}")
    return FOLDER / f"{algorithm}.yml"
