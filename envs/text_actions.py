"""Text instead of tokens: wrappers whose action is a piece of text, and whose observation is the text so far.

For agents that write words, fragments or whole turns, such as a language model behind an interface that takes and
returns strings. :class:`~textgym.envs.text_write.TextWriteEnv` (``TextWrite-v0``) is ``TextGen-v0`` in both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from textgym.checks import check_text, shown
from textgym.continuation import continuation_ids, decode
from textgym.envs.arguments import log_probabilities
from textgym.envs.env import TextGenEnv
from textgym.envs.text_space import UnicodeText
from textgym.vocabulary import Vocabulary

SUMMED = ("reward_model", "kl", "ref_log_prob", "missing_eos_penalty")  # infos of a token that add up over a text


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

    A text that the tokenizer can't write (a few know certain words only) is a ``ValueError`` that changes nothing.
    Texts longer than the action space says are tolerated, as the budget ends them.

    :param env: ``TextGen-v0``, bare or in wrappers that leave its actions alone
    :param end_of_turn: append the token that ends a turn after every action: an action is a whole turn
    """

    def __init__(self, env: gym.Env[Any, Any], end_of_turn: bool = False) -> None:
        if not isinstance(end_of_turn, bool):
            raise TypeError(f"end_of_turn={end_of_turn!r} must be True or False")
        RecordConstructorArgs.__init__(self, end_of_turn=end_of_turn)
        gym.Wrapper.__init__(self, env)
        self.end_of_turn = end_of_turn
        self._base = base_env("TextActions", env)
        if env.action_space != self._base.action_space:
            raise ValueError(f"env={env} has the actions {env.action_space}; TextActions writes tokens to TextGen-v0")
        vocabulary = self._base.vocabulary
        self.action_space: Any = UnicodeText(self._base.max_new_tokens * longest_token(vocabulary))
        self._reported: np.ndarray | None = None

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
        self._reported = None
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Append a piece of text, token by token, or as much of it as the episode lasts."""
        tokens = self.encode(action)
        log_probs = self._log_probs(len(tokens))
        before = decode(self._base.vocabulary, self._base.token_ids)
        rewards: list[float] = []
        infos: list[dict[str, Any]] = []
        for i, token in enumerate(tokens):
            if log_probs is not None:
                self._base.report_log_prob(log_probs[i])
            observation, reward, terminated, truncated, info = self.env.step(token)
            rewards.append(float(reward))
            infos.append(info)
            if terminated or truncated:
                break
        written = decode(self._base.vocabulary, self._base.token_ids)[len(before) :]
        summed = {name: sum(info[name] for info in infos) for name in SUMMED if name in infos[-1]}
        # A character whose last bytes found no room any more is decoded as another one and is treated as unused.
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(written, action, strict=False))
        unused = action[sum(1 for _ in same) :]
        more = {"tokens": tokens[: len(rewards)], "token_rewards": rewards, "unused": unused}
        return observation, sum(rewards), terminated, truncated, {**infos[-1], **summed, **more}

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
