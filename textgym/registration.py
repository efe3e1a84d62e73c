"""The table of environment ids.

The entry points are strings, so that registering imports neither torch nor the environments.
"""

from __future__ import annotations

from typing import TypedDict

import gymnasium


class EntryPoints(TypedDict):
    """Where Gymnasium finds the two forms of one environment."""

    entry_point: str
    vector_entry_point: str


ENVIRONMENTS: dict[str, EntryPoints] = {
    "TextGen-v0": {
        "entry_point": "textgym.envs.env:TextGenEnv",
        "vector_entry_point": "textgym.envs.vector_env:TextGenVectorEnv",
    },
    "TextWrite-v0": {
        "entry_point": "textgym.envs.text_write:TextWriteEnv",
        "vector_entry_point": "textgym.envs.text_write:TextWriteVectorEnv",
    },
}


def register_envs() -> None:
    """Register every id of ``ENVIRONMENTS`` with Gymnasium.

    Ids that are already registered with our entry points are left alone: importing textgym again, as
    ``importlib.reload`` and notebooks do, must not warn that an environment is overridden.
    """
    for env_id, entry_points in ENVIRONMENTS.items():
        registered = gymnasium.registry.get(env_id)
        if registered is None or registered.entry_point != entry_points["entry_point"]:
            gymnasium.register(env_id, **entry_points)
