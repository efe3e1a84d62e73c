"""Games that the policy plays: a game's words are what the reply says, and its points are paid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from textgym.checks import check_int, check_seed, check_text
from textgym.replies.base import Reply, ReplyResult, Transcript
from textgym.replies.errors import ReplyError

GAME = "game"
"""The column of the prompt rows that has the seed of a game."""


class Game(Protocol):
    """A game in words, for one player. The same seed and the same words give the same game."""

    def reset(self, seed: int) -> str:
        """Begin anew; the text with which the game opens."""

    def step(self, text: str) -> ReplyResult:
        """What the game says to the player's words, pays for them, and whether it is over."""


class _Played(NamedTuple):
    """A game that is being played, and with what words so far."""

    game: Game
    seed: int
    words: list[str]


class GameReply(Reply):
    """Plays a game in each row. :attr:`prompts` are the openings of games, for ``prompts=`` of the environment. ::

        >>> class HigherOrLower:
        ...     def reset(self, seed):
        ...         self.number = 1 + seed % 9
        ...         return "A number from 1 to 9:"
        ...     def step(self, text):
        ...         guess = int(text) if text.strip().isdigit() else 0
        ...         if guess == self.number:
        ...             return ReplyResult(" right", reward=1.0, done=True)
        ...         return ReplyResult(" higher:" if guess < self.number else " lower:")
        >>> game = GameReply(HigherOrLower, games=2, seed=3)
        >>> game.prompts
        [{'prompt': 'A number from 1 to 9:', 'game': 3}, {'prompt': 'A number from 1 to 9:', 'game': 4}]
        >>> turn = {"role": "assistant", "content": " 2"}
        >>> game.reply(np.arange(1), ["A number from 1 to 9:"], [[turn]], {"game": [3]})
        [ReplyResult(text=' higher:', reward=0.0, done=False)]

    A game is known by its seed and the words in the transcript. So nothing of it is in checkpoints: where a row goes on
    with another game than the one that it has, that one is played again from its beginning.

    :param make: makes a :class:`Game` for a row, which is reset for each of the row's games. One that fails is left; if
        it has a method ``close``, that is called then
    :param games: how many there are
    :param seed: of the first; the others have the numbers that follow
    :param role: whose message it is in a chat template
    :raises ValueError: if an argument is impossible
    """

    def __init__(self, make: Callable[[], Game], games: int = 100, seed: int = 0, role: str = "user") -> None:
        self.make = make
        self.games = check_int("games", games, low=1)
        self.first_seed = check_seed("seed", seed) or 0
        self.role = check_text("role", role, empty=False)
        self._played: dict[int, _Played] = {}

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """A prompt row for each game: its opening, and its seed in the column ``game``."""
        seeds = range(self.first_seed, self.first_seed + self.games)
        game = self.make()
        try:
            return [{"prompt": game.reset(seed), GAME: seed} for seed in seeds]
        finally:
            _close(game)

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> list[ReplyResult]:
        if GAME not in columns:
            raise ReplyError(self.name, f"needs a column {GAME!r} of the prompts, as its own prompts= have it")
        said = []
        for row, transcript, seed in zip(rows.tolist(), transcripts, columns[GAME], strict=True):
            words = [str(message["content"]) for message in transcript if message["role"] == "assistant"]
            said.append(self._play(row, int(seed), words))
        return said

    def _play(self, row: int, seed: int, words: list[str]) -> ReplyResult:
        """What a row's game says to the last words."""
        # A game that fails amid a move is not gone on with.
        played = self._played.pop(row, None)
        game = self.make() if played is None else played.game
        try:
            if played is None or (played.seed, played.words) != (seed, words[:-1]):
                game.reset(seed)
                for text in words[:-1]:
                    game.step(text)
            result = game.step(words[-1])
        except BaseException:
            _close(game)
            raise
        self._played[row] = _Played(game, seed, words)
        return result


def _close(game: Game) -> None:
    close = getattr(game, "close", None)
    if close is not None:
        close()
