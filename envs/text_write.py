"""``TextWrite-v0``: one text, or a conversation, written piece by piece by an agent that sees and writes strings."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

from textgym.checks import check_int, check_text, shown
from textgym.envs.arguments import reset_options, seeds_of_rows
from textgym.envs.env import TextGenEnv
from textgym.envs.sharing import unshare
from textgym.envs.text_actions import TextActions, TextObservations, longest_token
from textgym.envs.text_space import UnicodeText
from textgym.envs.vector_env import TextGenVectorEnv
from textgym.replies import Reply, ReplyResult
from textgym.replies.base import Transcript


class TextWriteEnv(TextGenEnv):
    """Text generation in pieces of text: ``TextGen-v0`` for agents that read and write strings.

    ## Description
    The state is a text: a prompt x and what has been written after it, y. An action appends a piece, which may be a
    letter, a word, a fragment or a whole turn. It is tokenised and appended token by token, so rewards, KL penalty and
    budget are those of ``TextGen-v0``. Nothing of it needs to be downloaded::

        >>> import gymnasium as gym, textgym
        >>> env = gym.make("TextWrite-v0")
        >>> observation, info = env.reset(seed=0, options={"prompt": "the film is"})
        >>> for word in (" a", " great", " joy", "."):
        ...     observation, reward, terminated, truncated, info = env.step(word)
        >>> observation
        'the film is a great joy.'
        >>> observation, reward, terminated, truncated, info = env.step("")
        >>> terminated, info["finish_reason"], info["score"] > 0
        (True, 'eos', True)
        >>> env.close()

    ## Turns
    With ``reply`` an action is a whole turn, and the observation is what was said to it: the episodes are those of
    ``TextGen-v0`` with the same reply. ::

        >>> def critic(transcripts, **columns):
        ...     return [" Why?" if len(transcript) == 1 else None for transcript in transcripts]
        >>> env = gym.make("TextWrite-v0", reply=critic)
        >>> env.reset(options={"prompt": "the film is"})[0]
        'the film is'
        >>> observation, reward, terminated, truncated, info = env.step(" a great joy.")
        >>> observation, terminated
        (' Why?', False)
        >>> observation, reward, terminated, truncated, info = env.step(" It is funny.")
        >>> observation, terminated, info["finish_reason"]
        ('', True, 'reply')
        >>> [message["content"] for message in info["transcript"]]
        [' a great joy.', ' Why?', ' It is funny.']
        >>> env.close()

    ## Action Space
    ``UnicodeText``, a ``spaces.Text`` of any characters: what to append, exactly as it stands. ``" good"`` starts a new
    word, ``"good"`` goes on with the last one. ``""`` ends the text with a token that ends a turn; with
    ``end_of_turn=True``, and with a reply, every action does. No special token is read from a text. Longer texts than
    the space has are tolerated, as the budget of tokens ends them.

    ## Observation Space
    ``UnicodeText``: prompt and completion so far, without special tokens. A prompt longer than ``max_prompt_tokens`` is
    cut on the left. With a reply, what was said last: the prompt, then each reply, cut where it was too long; ``""``
    where nobody spoke.

    ## Starting State
    A prompt drawn from ``prompts`` with the environment's random numbers; the completion is empty.
    ``reset(options={"prompt": "the film"})`` chooses it.

    ## Rewards
    The sum of the rewards that ``TextGen-v0`` pays for the piece's tokens: the change of the reward model's score Φ,
    less ``kl_coef`` times the KL penalty in nats, less ``missing_eos_penalty`` where the budget ran out. Φ's part
    telescopes over an episode to Φ(x, y) − Φ(x, ∅). For the KL the agent tells with which log-probability it wrote the
    piece: ``env.unwrapped.report_log_prob(...)`` before ``step``, the sum over the piece or one value for each token
    of ``env.unwrapped.encode(text)``. Without a report it is treated as deterministic, log π = 0.

    ## Episode End
    - terminated: a token that ends a turn (after ``min_new_tokens``), or a stop string
    - truncated: ``max_new_tokens`` are used up

    Either may happen within a piece; the rest of it is not used. With a reply both end the turn, which is then
    answered, and the episode ends as that of ``TextGen-v0`` does. A turn shorter than ``min_new_tokens`` goes on with
    the next action.

    ## Information
    At reset ``prompt`` (text). At each step ``tokens`` (ids of the piece, as far as they were appended),
    ``token_rewards`` (one for each of them), ``unused`` (text that found no room, mostly ``""``), and summed over the
    tokens ``reward_model``, ``kl`` and ``ref_log_prob`` (nats; left out where ``kl_coef=0`` has loaded no reference
    model) and ``missing_eos_penalty`` where that is set. At the end ``finish_reason`` (``"eos"``, ``"stop"`` or
    ``"length"``), ``prompt``, ``completion`` (texts), ``score`` (Φ(x, y)) and
    ``applies`` (False where the reward is None, "not applicable"). With a reply also what ``TextGen-v0`` says of it.

    ## Arguments
    | option | default | meaning |
    |---|---|---|
    | ``end_of_turn`` | ``False``; ``True`` with a reply | append the token that ends a turn after every action |

    and those of ``TextGen-v0``, see :class:`~textgym.envs.env.TextGenEnv`.

    ## Version History
    * v0: first version
    """

    def __init__(self, *, end_of_turn: bool | None = None, **options: Any) -> None:
        tokens = TextGenEnv(**options)
        self._rows, self._process = tokens._rows, tokens._process
        self._actions = TextActions(tokens, end_of_turn=end_of_turn)
        self._text = TextObservations(self._actions)
        self.action_space = self._actions.action_space
        self.observation_space = self._text.observation_space
        limits = self._process.rules.turns
        if limits is not None:
            said = limits.max_reply_tokens * longest_token(tokens.vocabulary)
            self.observation_space = UnicodeText(max(self._text.observation_space.max_length, said))
        self.render_mode = tokens.render_mode

    def encode(self, text: str) -> list[int]:
        """The tokens that ``step(text)`` would append in the current state, the budget aside.

        :raises ValueError: if the tokenizer can't write the text
        """
        return self._actions.encode(text)

    def report_log_prob(self, log_prob: Any) -> None:
        """Tell under which log-probability, in nats, the text of the coming step was sampled: a number, or one for
        each token of :meth:`encode`; see :meth:`TextActions.report_log_prob`.

        :raises ValueError: if a value is not a log-probability
        """
        self._actions.report_log_prob(log_prob)

    def reset(  # type: ignore[override]
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Begin an episode.

        :param seed: of the random numbers that draw prompts
        :param options: ``prompt``: a text to start from, instead of a drawn prompt
        """
        seed = self._checked_reset(seed, options)
        gym.Env.reset(self, seed=seed)
        text, info = self._text.reset(seed=seed, options=options)
        self._show_random_numbers()
        return text, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:  # type: ignore[override]
        """Append a piece of text; with a reply, a turn."""
        text, reward, terminated, truncated, info = self._text.step(action)
        if self.reply is not None:
            # As the model sees it: a reply that was too long is cut there, and not in the infos.
            text = "" if info.get("reply") is None else self.transcript[-1]["content"]
        return text, float(reward), terminated, truncated, info


class TextWriteVectorEnv(SyncVectorEnv):
    """N independent ``TextWrite-v0`` episodes one after the other, on one language model and reward.

    Actions and observations are tuples of N texts. Pieces have different numbers of tokens, so rows aren't stepped
    together as those of ``TextGen-v0`` are; what is saved is the memory of N models. Row i behaves like a single
    environment that was reset with ``seed + i``. Gymnasium's ``vectorization_mode="async"`` needs
    ``vector_kwargs={"shared_memory": False}`` here: through shared memory it hands on texts as they were at first. ::

        >>> import gymnasium as gym, textgym
        >>> envs = gym.make_vec("TextWrite-v0", num_envs=2)
        >>> texts, infos = envs.reset(seed=0, options={"prompt": "the film is"})
        >>> texts, rewards, *_ = envs.step((" a joy to watch.", " dull."))
        >>> texts, bool(rewards[0] > rewards[1])
        (('the film is a joy to watch.', 'the film is dull.'), True)
        >>> envs.close()

    :param num_envs: number of rows N
    :param autoreset_mode: an ``AutoresetMode`` or its value
    :param max_episode_steps: Gymnasium's limit: episodes are truncated after so many pieces
    :param options: see :class:`TextWriteEnv`
    """

    spec = TextGenVectorEnv.spec  # models in it are shared, not copied
    _spec = None

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        max_episode_steps: int | None = None,
        **options: Any,
    ) -> None:
        check_int("num_envs", num_envs, low=1)
        options = {name: unshare(value) for name, value in options.items()}
        first = TextWriteEnv(**options)
        rows = first._rows
        reply = rows.reply
        # The model is opened once; what belongs to opening it isn't asked for again.
        if rows._process.language_model.held is not None:
            options.pop("tokenizer", None)
            options["language_model"] = rows._process.language_model.held
        options["reward"] = rows.reward

        limit = None if max_episode_steps == -1 else max_episode_steps  # -1 is Gymnasium's word for no limit
        seed = options.get("seed")
        make = [functools.partial(_limited, first, limit)]
        for row in range(1, num_envs):
            mine = {**options, "seed": None if seed is None else seed + row}
            if reply is not None:
                mine["reply"] = _OneRow(reply, row)
            make.append(functools.partial(_limited, mine, limit))
        super().__init__(make, autoreset_mode=autoreset_mode)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in every row, or in those of ``options["reset_mask"]``.

        :param seed: of row 0, the following rows get the following numbers; or a list with one seed per row
        :param options: ``reset_mask``: ``(N,)`` bool; ``prompt``: a text to start from, instead of drawn prompts
        :raises TypeError: for a seed, options or a prompt of another kind
        :raises ValueError: for a seed below 0, unknown options or an empty prompt
        """
        given = reset_options(options, ("prompt", "reset_mask"))
        return super().reset(seed=seeds_of_rows(seed, self.num_envs), options=given or None)

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Append a piece of text to every row.

        :param actions: N texts
        :raises TypeError: if one is not a text
        :raises ValueError: if there are not N of them, or the tokenizer can't write one
        """
        if isinstance(actions, str) or not isinstance(actions, Sequence | np.ndarray):
            raise TypeError(f"actions={shown(actions)} must be {self.num_envs} texts (str), in a tuple or list")
        if len(actions) != self.num_envs:
            raise ValueError(f"actions={shown(actions)} has {len(actions)} entries, expected {self.num_envs} texts")
        return super().step(tuple(check_text(f"actions[{row}]", text) for row, text in enumerate(actions)))


class _OneRow(Reply):
    """What a reply says to a single environment, which is one of the rows that it speaks to.

    :param reply: speaks to all rows
    :param row: which one the environment is
    """

    def __init__(self, reply: Reply, row: int) -> None:
        self._reply = reply
        self._row = row
        self.role = reply.role

    @property
    def name(self) -> str:
        return self._reply.name

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> Sequence[str | ReplyResult | None]:
        return self._reply.reply(rows + self._row, prompts, transcripts, columns)

    def begin(self, rows: np.ndarray) -> None:
        self._reply.begin(rows + self._row)

    def seed(self, seed: int) -> None:
        self._reply.seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return self._reply.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reply.load_state_dict(state)


def _limited(env: TextWriteEnv | dict[str, Any], limit: int | None) -> gym.Env:
    """An environment, or one with these options, whose episodes have at most so many steps.

    A function of the module, so that the vector environment, which keeps it, can be pickled.
    """
    made: gym.Env = env if isinstance(env, TextWriteEnv) else TextWriteEnv(**env)
    return made if limit is None else TimeLimit(made, limit)
