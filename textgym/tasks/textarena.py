"""Games of TextArena for one player; needs the extra ``textarena``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from textgym.checks import check_text, shown
from textgym.extras import import_extra
from textgym.replies.base import ReplyResult
from textgym.replies.games import GameReply


class TextArenaGame(GameReply):
    """A game of TextArena, played in each row: what it says is the reply, and its reward is paid when it is over. ::

        game = TextArenaGame("GuessTheNumber-v0", games=500)
        envs = gym.make_vec("TextGen-v0", num_envs=8, prompts=game.prompts, reply=game, max_turns=10, stop="]")

    The policy reads the game's own messages, without a history, as the transcript is one. Games draw random numbers of
    their own, and leave Python's and NumPy's generators alone. An error that a game raises at the player's words ends
    it, with the error as its text and a reward of 0.

    :param game: the id of a game for one player, such as ``"GuessTheNumber-v0"``; its wrappers are left out
    :param games: how many there are
    :param seed: of the first; the others have the numbers that follow
    :param says: how a message is written, ``{}`` being the message; ``"{}"`` in a chat template
    :param role: whose message it is in a chat template
    :param settings: of the game, such as ``max_number=50``
    :raises ModuleNotFoundError: if TextArena is not installed
    :raises ValueError: if there is no such game, it is for more players, or a setting is impossible
    """

    def __init__(
        self, game: str, games: int = 100, seed: int = 0, says: str = "\n{}\n", role: str = "user", **settings: Any
    ) -> None:
        arena = import_extra("textarena", "textarena", "TextArenaGame")
        registered = arena.envs.registration.ENV_REGISTRY
        name = check_text("game", game, empty=False)
        if name not in registered:
            raise ValueError(f"TextArena has no game={shown(game)}; textarena.pprint_registry_detailed() lists them")
        raw = name if f"{name}-raw" not in registered else f"{name}-raw"
        if "{}" not in check_text("says", says):
            raise ValueError(f"says={shown(says)} must have {{}} where the message goes")
        self._game_name = name
        super().__init__(lambda: _Game(arena, raw, settings, says), games, seed, role)
        try:
            self.make().reset(self.first_seed)
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"game={name!r} can't be played by one player with {settings}: {error}") from error

    @property
    def name(self) -> str:
        return f"TextArenaGame({self._game_name})"


class _Game:
    """One game."""

    def __init__(self, arena: Any, name: str, settings: dict[str, Any], says: str) -> None:
        self._arena, self._name, self._settings, self._says = arena, name, settings, says
        self._drawn: tuple[Any, Any] | None = None  # the states of the generators that it draws from

    def reset(self, seed: int) -> str:
        with self._own_randomness(seed):
            self._env = self._arena.make(self._name, **self._settings)
            self._env.reset(num_players=1, seed=seed)
            return self._messages() + self._says.rpartition("{}")[2]

    def step(self, text: str) -> ReplyResult:
        with self._own_randomness():
            try:
                done, _ = self._env.step(action=text)
            except Exception as error:  # at words that the game did not expect
                return ReplyResult(self._says.replace("{}", f"error: {error}"), 0.0, True)
            said = self._messages()
            if not done:
                return ReplyResult(self._says.replace("{}", said))
            rewards, info = self._env.close()
            reason = str((info or {}).get(0, {}).get("reason") or "")
            said = "\n".join(part for part in (said, reason) if part)
            return ReplyResult(self._says.replace("{}", said), float((rewards or {}).get(0, 0.0)), True)

    def _messages(self) -> str:
        """What the game has said since it was asked last, without the player's own words."""
        _, messages = self._env.get_observation()
        own = self._arena.ObservationType.PLAYER_ACTION
        return "\n".join(str(message).strip() for _, message, kind in messages if kind != own)

    @contextmanager
    def _own_randomness(self, seed: int | None = None) -> Iterator[None]:
        """Games draw from the global generators: here these are the game's for the time being."""
        outside = random.getstate(), np.random.get_state()  # noqa: NPY002
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
        else:
            assert self._drawn is not None
            random.setstate(self._drawn[0])
            np.random.set_state(self._drawn[1])  # noqa: NPY002
        try:
            yield
        finally:
            self._drawn = random.getstate(), np.random.get_state()  # noqa: NPY002
            random.setstate(outside[0])
            np.random.set_state(outside[1])  # noqa: NPY002
