"""An environment of texts as a server of OpenEnv, for what trains on such servers; needs the extra ``openenv``."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from textgym.checks import check_int
from textgym.extras import import_extra

if TYPE_CHECKING:
    from fastapi import FastAPI


def openenv_app(max_concurrent_envs: int = 1, **options: Any) -> FastAPI:
    """An ASGI application that serves ``TextWrite-v0`` to clients of OpenEnv, each in a session of its own. ::

        app = openenv_app(max_concurrent_envs=8, reward="embedded")   # in server.py; then: uvicorn server:app

    An action is ``{"text": ...}``, a piece of text or, with a ``reply``, a turn. Observations have ``text``, and at the
    end of an episode ``finish_reason`` and ``score``. ``reset`` takes ``seed`` and ``prompt``. An environment for a
    session is made when it is needed, and kept for the next client. Steps are taken one after the other.

    :param max_concurrent_envs: sessions at once
    :param options: of :class:`~textgym.envs.TextWriteEnv`
    :raises ModuleNotFoundError: if openenv-core is not installed
    :raises ValueError: if an option is impossible
    """
    check_int("max_concurrent_envs", max_concurrent_envs, low=1)
    server: Any = import_extra("openenv.core.env_server", "openenv", "openenv_app")
    free = [gym.make("TextWrite-v0", **options)]
    turn = threading.Lock()  # models that sessions share are for one caller

    class TextAction(server.Action):
        text: str

    class TextObservation(server.Observation):
        text: str
        finish_reason: str | None = None
        score: float | None = None

    class TextEnvironment(server.Environment):
        SUPPORTS_CONCURRENT_SESSIONS = True

        def __init__(self) -> None:
            super().__init__()
            with turn:
                self._env = free.pop() if free else gym.make("TextWrite-v0", **options)
            self._state = server.State(episode_id=None, step_count=0)

        def reset(
            self, seed: int | None = None, episode_id: str | None = None, prompt: str | None = None
        ) -> TextObservation:
            with turn:
                text, _ = self._env.reset(seed=seed, options=None if prompt is None else {"prompt": prompt})
            self._state = server.State(episode_id=episode_id or uuid.uuid4().hex, step_count=0)
            return TextObservation(text=text, reward=None, done=False)

        def step(self, action: TextAction, timeout_s: float | None = None) -> TextObservation:
            with turn:
                text, reward, terminated, truncated, info = self._env.step(action.text)
            self._state.step_count += 1
            end = {"finish_reason": info["finish_reason"], "score": float(info["score"])} if "score" in info else {}
            return TextObservation(text=text, reward=float(reward), done=bool(terminated or truncated), **end)

        @property
        def state(self) -> Any:
            return self._state

        def close(self) -> None:
            with turn:
                free.append(self._env)

    app: FastAPI = server.create_app(
        TextEnvironment, TextAction, TextObservation, env_name="textgym", max_concurrent_envs=max_concurrent_envs
    )
    return app
