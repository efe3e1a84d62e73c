"""Text instead of tokens: wrappers whose action is a piece of text, and whose observation is the text so far.

For agents that write words, fragments or whole turns, such as a language model behind an interface that takes and
returns strings. :class:`~textgym.envs.text_write.TextWriteEnv` (``TextWrite-v0``) is ``TextGen-v0`` in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from textgym.checks import check_bool, check_text, shown
from textgym.continuation import continuation_ids, decode
from textgym.envs.arguments import log_probabilities
from textgym.envs.env import TextGenEnv
from textgym.envs.text_space import UnicodeText
from textgym.vocabulary import Vocabulary

SUMMED = ("reward_model", "kl", "ref_log_prob", "missing_eos_penalty")  # infos of a token that add up over a text


@dataclass
class _Text:
    """A text that is being written: the tokens before it and of it, and what those that are written have earned."""

    action: str
    before: list[int]
    tokens: list[int]
    log_probs: list[float] | None
    rewards: list[float] = field(default_factory=list)
    infos: list[dict[str, Any]] = field(default_factory=list)


class TextActions(gym.Wrapper, RecordConstructorArgs):
    """An action is a piece of text; it is appended token by token, and the rewards of its tokens are summed.

    The text is appended as it stands: ``" good"`` starts a word and ``"good"`` goes on with the one before, whatever
    the tokenizer makes of a text's beginning. Nothing in it is read as a special token. The empty text ends the
    completion with a token that ends a turn::

        >>> import gymnasium as gym, textgym
        >>> from textgym.envs import TextActions
        >>> env = TextActions(gym.make("TextGen-v0"))
        >>> observation, info = env.reset(seed=0, options={"prompt": "the film is"})
        >>> observation, reward, terminated, truncated, info = env.step(" a triumph")
        >>> env.unwrapped.tokenizer.decode(info["tokens"])
        'a triumph'
        >>> reward == sum(info["token_rewards"])
        True
        >>> env.step("")[4]["completion"]
        ' a triumph'
        >>> env.close()

    Where the episode ends within a text (budget, stop string, or a wrapper below such as ``TimeLimit``), the rest of it
    is not used. Beside the infos of the last token there are

    - ``tokens``: the ids that were appended; ``token_rewards``: the reward of each
    - ``reward_model``, ``kl``, ``ref_log_prob``, ``missing_eos_penalty``: summed over those tokens
    - ``unused``: the rest of the text, ``""`` where all of it was appended

    With a reply an action is a turn: the text, then a token that ends a turn, unless the text has ended it already,
    with a stop string or the last token of its budget. Then, too, the rest of the text is not used, and the next text
    begins the next turn. Where reward or reply fail within a text, the step can be taken again with the same text.

    A text that the tokenizer can't write (a few know certain words only) is a ``ValueError`` that changes nothing.
    Texts longer than the action space says are tolerated, as the budget ends them.

    :param env: ``TextGen-v0``, bare or in wrappers that leave its actions alone
    :param end_of_turn: append the token that ends a turn after every action: an action is a whole turn. By default
        where the environment has a reply, and there always
    """

    def __init__(self, env: gym.Env[Any, Any], end_of_turn: bool | None = None) -> None:
        if end_of_turn is not None:
            check_bool("end_of_turn", end_of_turn)
        RecordConstructorArgs.__init__(self, end_of_turn=end_of_turn)
        gym.Wrapper.__init__(self, env)
        self._base = base_env("TextActions", env)
        replied = self._base.reply is not None
        if replied and end_of_turn is False:
            raise ValueError("end_of_turn=False, but the environment has a reply, and an action is a whole turn there")
        self.end_of_turn = replied or bool(end_of_turn)
        if env.action_space != self._base.action_space:
            raise ValueError(f"env={env} has the actions {env.action_space}; TextActions writes tokens to TextGen-v0")
        vocabulary = self._base.vocabulary
        self.action_space: Any = UnicodeText(self._base.max_new_tokens * longest_token(vocabulary))
        self._reported: np.ndarray | None = None
        self._begun: _Text | None = None

    def encode(self, action: str) -> list[int]:
        """The tokens that ``step(action)`` would append in the current state, the budget aside.

        :raises ValueError: if the tokenizer can't write the text
        """
        if not isinstance(action, str):
            raise TypeError(
                f"action={shown(action)} must be a text (str); TextGen-v0 without TextActions takes token ids"
            )
        check_text("action", action)
        vocabulary, so_far = self._base.vocabulary, self._base.token_ids
        tokens = continuation_ids(vocabulary, so_far, action)
        if self.end_of_turn or not action:
            tokens.append(vocabulary.end_after(so_far))
        return tokens

    def report_log_prob(self, log_prob: float | Sequence[float]) -> None:
        """Tell under which log-probability, in nats, the text of the coming step was sampled.

        A number is that of the whole text, an end-of-sequence token included, and counts in equal parts for its tokens:
        with the ``k1`` estimator the KL of the text is exact whatever the parts are. A sequence has one log-probability
        for each token of :meth:`encode`. Without a report the agent is treated as deterministic, log π = 0. Holds for
        one step. ``env.unwrapped.report_log_prob`` would tell of a single token.

        :raises ValueError: if a value is not a log-probability
        """
        self._reported = log_probabilities("log_prob", log_prob)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; see :meth:`TextGenEnv.reset`."""
        self._reported = self._begun = None
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Append a piece of text, token by token, or as much of it as the episode or the turn lasts.

        :raises ValueError: if it isn't the text of the step before, which an error has interrupted
        """
        text = self._text(action)
        ended = False
        while not ended and len(text.rewards) < len(text.tokens):
            at = len(text.rewards)
            if text.log_probs is not None:
                self._base.report_log_prob(text.log_probs[at])
            self._begun = text  # until it is written: a reward or a reply may fail
            observation, reward, terminated, truncated, info = self.env.step(text.tokens[at])
            text.rewards.append(float(reward))
            text.infos.append(info)
            ended = terminated or truncated or "turn" in info
        self._begun = None
        tokens, infos = text.tokens[: len(text.rewards)], text.infos
        before = decode(self._base.vocabulary, text.before)
        written = decode(self._base.vocabulary, text.before + tokens)[len(before) :]
        summed = {name: sum(info[name] for info in infos) for name in SUMMED if name in infos[-1]}
        # A character whose last bytes found no room any more is decoded as another one and is treated as unused.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(written, action, strict=False))
        unused = action[sum(1 for _ in same) :]
        more = {"tokens": tokens, "token_rewards": text.rewards, "unused": unused}
        return observation, sum(text.rewards), terminated, truncated, {**infos[-1], **summed, **more}

    def _text(self, action: str) -> _Text:
        """A text that is to be written; what is left of it, where an error has interrupted it."""
        begun = self._begun
        if begun is not None and self._base.token_ids != begun.before + begun.tokens[: len(begun.rewards)]:
            begun = None  # whoever has the environment has begun anew
        if begun is None or (action != begun.action and not begun.rewards):
            tokens = self.encode(action)
            return _Text(action, self._base.token_ids, tokens, self._log_probs(len(tokens)))
        if action != begun.action:
            raise ValueError(
                f"action={shown(action)}, but an error has interrupted the text {shown(begun.action)}: write that one "
                "again, which goes on where it was, or reset()"
            )
        self._reported = None
        return begun

    def _log_probs(self, count: int) -> list[float] | None:
        """What was reported, one for each of the tokens."""
        reported, self._reported = self._reported, None
        if reported is None:
            return None
        if reported.ndim == 0:
            return [float(reported) / count] * count
        if len(reported) != count:
            raise ValueError(
                f"{len(reported)} log-probabilities were reported and the text has {count} tokens; "
                "encode(action) says which"
            )
        return [float(value) for value in reported]


class TextObservations(gym.ObservationWrapper, RecordConstructorArgs):
    """The observation is the text so far, prompt and completion: what stands in a text editor.

    With :class:`TextActions`, in either order, an agent sees and writes text alone::

        >>> import gymnasium as gym, textgym
        >>> from textgym.envs import TextActions, TextObservations
        >>> env = TextObservations(TextActions(gym.make("TextGen-v0")))
        >>> env.reset(seed=0, options={"prompt": "the film is"})[0]
        'the film is'
        >>> env.step(" a tri")[0]
        'the film is a tri'
        >>> env.step("umph.")[0]
        'the film is a triumph.'
        >>> env.close()

    Special tokens aren't shown. A prompt that was cut on the left begins where it was cut.

    :param env: ``TextGen-v0``, bare or in wrappers
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self._base = base_env("TextObservations", env)
        # A tokenizer of words writes a space between two tokens.
        width = longest_token(self._base.vocabulary) + 1
        context: int = self._base.observation_space["input_ids"].shape[0]  # type: ignore[index]
        self.observation_space: Any = UnicodeText(context * width)

    def observation(self, observation: Any) -> str:
        """The text so far, whatever form it had further in."""
        return decode(self._base.vocabulary, self._base.token_ids)


def base_env(wrapper: str, env: gym.Env[Any, Any]) -> TextGenEnv:
    """The text environment inside of ``env``.

    :raises ValueError: if there is none whose actions are tokens
    """
    base = env.unwrapped
    if not isinstance(base, TextGenEnv) or isinstance(base.action_space, UnicodeText):
        raise ValueError(f"env={env} is not a TextGen-v0; {wrapper} wraps one, alone or in wrappers")
    return base


def longest_token(vocabulary: Vocabulary) -> int:
    """A bound on the characters of one token."""
    return max(map(len, vocabulary.tokenizer.get_vocab()))
