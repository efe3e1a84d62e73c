"""Environments of OpenEnv, on their servers; needs the extra ``openenv``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textgym.checks import check_number, check_text, shown
from textgym.extras import import_extra
from textgym.replies.base import ReplyResult
from textgym.replies.games import GameReply


class OpenEnvGame(GameReply):
    """An environment on a server of OpenEnv: its observations are the replies, and its rewards are paid. ::

        game = OpenEnvGame("http://localhost:8000", action="message", observation="echoed_message")
        envs = gym.make_vec("TextGen-v0", num_envs=4, prompts=game.prompts, reply=game)

    Each row has a session of its own, so the server must take as many as there are rows (``max_concurrent_envs``). The
    server gets the game's seed: its environment must do the same after the same seed and actions.

    :param url: of the server
    :param action: the field of the environment's action that gets the policy's words; or a function that makes the
        action, a dict, of them
    :param observation: the field of its observation that is the reply; or a function that makes the text of the
        observation, a dict
    :param games: how many there are
    :param seed: of the first; the others have the numbers that follow
    :param role: whose message it is in a chat template
    :param timeout: for an answer, in seconds
    :raises ModuleNotFoundError: if openenv-core is not installed
    :raises ValueError: if an argument is impossible
    """

    def __init__(
        self,
        url: str,
        action: str | Callable[[str], dict[str, Any]],
        observation: str | Callable[[dict[str, Any]], str],
        games: int = 100,
        seed: int = 0,
        role: str = "user",
        timeout: float = 60.0,
    ) -> None:
        client = import_extra("openenv.core", "openenv", "OpenEnvGame").GenericEnvClient
        self.url = check_text("url", url, empty=False)
        check_number("timeout", timeout, low=0.0, open_low=True, unit="seconds")
        for name, value in (("action", action), ("observation", observation)):
            if not callable(value):
                check_text(name, value, empty=False)
        super().__init__(
            lambda: _Game(client(base_url=url, message_timeout_s=timeout).sync(), action, observation),
            games,
            seed,
            role,
        )

    @property
    def name(self) -> str:
        return f"OpenEnvGame({self.url})"


class _Game:
    """One session."""

    def __init__(
        self,
        client: Any,
        action: str | Callable[[str], dict[str, Any]],
        observation: str | Callable[[dict[str, Any]], str],
    ) -> None:
        self._client, self._action, self._observation = client, action, observation

    def reset(self, seed: int) -> str:
        return self._text(self._client.reset(seed=seed).observation)

    def step(self, text: str) -> ReplyResult:
        action = self._action(text) if callable(self._action) else {self._action: text}
        result = self._client.step(action)
        return ReplyResult(self._text(result.observation), float(result.reward or 0.0), bool(result.done))

    def _text(self, observation: dict[str, Any]) -> str:
        if callable(self._observation):
            return self._observation(observation)
        if not isinstance(observation.get(self._observation), str):
            raise ValueError(
                f"observation={self._observation!r} must name a text of the observations; they are {shown(observation)}"
            )
        return str(observation[self._observation])

    def close(self) -> None:
        self._client.close()
