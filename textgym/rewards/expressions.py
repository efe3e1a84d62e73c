"""Rewards written down as a short formula, such as ``0.5*coherence + 0.5*grammar``: what the command line takes.

A formula is read, never run as Python: it knows the rewards of this package, numbers, texts, lists, the signs
``+ - * /``, and the methods ``clip`` and ``normalized``. So a configuration that holds one is as harmless as its words.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import operator
import os
import re
import reprlib
from collections.abc import Callable
from typing import Any

from textgym import rewards
from textgym.embedded import REWARD_MODEL
from textgym.rewards.base import Reward
from textgym.rewards.code_names import names_code

# What people call them; every reward also has its class's name, in CamelCase and in snake_case.
_SHORT = {
    "chrf": "ChrF",
    "coherence": "EmbeddingCoherence",
    "keywords": "KeywordPresence",
    "json": "JsonFormat",
    "language": "LanguageIdentity",
    "length": "LengthTarget",
    "lexicon": "SentimentLexicon",
    "regex": "RegexMatch",
    "similarity": "EmbeddingSimilarity",
    "xml": "XmlTags",
}
EMBEDDED = "embedded"  # the sentiment model that ships with textgym
# Made from objects that no formula can name.
_NOT_NAMED = {
    "CausalRewardModel",
    "ClassifierReward",
    "EmbeddingDiversity",
    "FunctionReward",
    "LearningReward",
    "ProcessReward",
    "Reward",
}
_REACH_OUT = {"HumanReward", "RemoteReward"}  # write files, or send texts to others
_METHODS = ("clip", "normalized")
_SIGNS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 10_000  # characters
_HUB_ID = re.compile(r"[A-Za-z_][\w.-]*/[A-Za-z_][\w.-]*")


def reward_names() -> dict[str, str]:
    """The names that a formula may use for rewards, and the class that each stands for, shortest names first.

    >>> names = reward_names()
    >>> names["grammar"], names["self_bleu"], names["keywords"]
    ('Grammar', 'SelfBLEU', 'KeywordPresence')
    """
    names = dict(_SHORT)
    classes = [name for name in rewards.__all__ if name not in _NOT_NAMED and _is_reward(name)]
    for name in classes:
        names.setdefault(_snake_case(name.removesuffix("Reward")), name)
    for name in classes:
        names.setdefault(_snake_case(name), name)
        names[name] = name
    return names


def reaches_out(text: str) -> bool:
    """Whether a formula names a reward that writes files or sends texts to other machines."""
    names = reward_names()
    return any(names.get(word) in _REACH_OUT for word in re.findall(r"\w+", text))


def reward_named(text: str, trust_remote_code: bool = False) -> Reward:
    """The reward of a name that runs no code: a formula, a directory, a hub id, or ``embedded``.

    :param trust_remote_code: run Python code that comes with a reward model in a directory or on the hub
    :raises ValueError: if there is no such reward, or the name is that of code
    :raises FileNotFoundError: if it is written as a path and nothing is there
    """
    from textgym.rewards.reward_directory import open_reward  # loads transformers

    text = text.strip()
    if text == EMBEDDED:
        return embedded_reward()
    if os.path.isdir(text) or text.startswith((".", "~", os.sep)):
        return open_reward(text, trust_remote_code=trust_remote_code)
    if _HUB_ID.fullmatch(text):
        if os.path.isdir(text.partition("/")[0]):
            raise FileNotFoundError(f"reward={text!r}: there is no such directory")
        return open_reward(text, trust_remote_code=trust_remote_code)
    if names_code(text):
        raise ValueError(f"reward={text!r} is Python code: import it, and pass the function or object itself")
    return parse_reward(text)


def embedded_reward() -> Reward:
    """The sentiment model that ships with textgym."""
    from textgym.rewards.reward_directory import open_reward  # loads transformers

    return open_reward(REWARD_MODEL)


def parse_reward(text: str, given: dict[str, Reward] | None = None) -> Reward:
    """The reward that a formula describes. ::

        >>> reward = parse_reward("0.5*keywords(['rain', 'umbrella']) - 0.1*length(8, unit='words').clip(0, 1)")
        >>> reward(prompts=["take"], completions=[" an umbrella"])
        [0.225]

    A name alone stands for the reward with its defaults; ``embedded`` is the sentiment model that ships with textgym.
    A text in quotation marks in the place of a reward is the directory or hub id of a reward model.

    :param text: the formula
    :param given: rewards that further names stand for
    :raises ValueError: naming the part that is wrong, and what would be right
    """
    if len(text) > _LONGEST:
        raise ValueError(f"reward is a formula of {len(text)} characters; at most {_LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval")
        value = _Reader(text, given or {}).value(tree.body)
    except SyntaxError as error:
        raise ValueError(
            f"reward={shown(text)} can't be read: {error.msg} at character {error.offset}. "
            "Write for example 0.5*coherence + 0.5*grammar"
        ) from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("reward is a formula that is nested too deeply") from error
    if isinstance(value, str):
        return reward_named(value)
    if not isinstance(value, Reward):
        raise ValueError(f"reward={shown(text)} is {reprlib.repr(value)}, expected a reward, such as grammar")
    return value


def written(signature: inspect.Signature) -> str:
    """The arguments of a signature as one writes them, without what gathers others. ::

    >>> written(inspect.signature(lambda n=2, *, unit="words", **options: None))
    "n=2, unit='words'"
    """
    gathering = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in signature.parameters.values()
        if p.kind not in gathering
    )


def shown(text: str) -> str:
    """A text for a message, cut where it is long."""
    return repr(text if len(text) <= 120 else text[:117] + "...")


class _Reader:
    """Evaluates the nodes of one formula."""

    def __init__(self, text: str, given: dict[str, Reward]) -> None:
        self.text = text
        self.given = given
        self.names = reward_names()

    def value(self, node: ast.expr) -> Any:
        """A number, a text, a list, a dictionary or a :class:`Reward`."""
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
            return node.value
        if isinstance(node, ast.Name):
            return self._named(node)
        if isinstance(node, ast.Call):
            return self._called(node)
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            return self._combined(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            value = self._operand(node.operand)
            return -value if isinstance(node.op, ast.USub) else value
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.Dict) and None not in node.keys:
            return {self.value(k): self.value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
        raise self._wrong(
            node,
            "is not part of a formula: it has names of rewards, numbers, texts, lists, + - * / and .clip(low, high)",
        )

    def _named(self, node: ast.Name) -> Reward:
        if node.id in self.given:
            return self.given[node.id]
        if node.id == EMBEDDED:
            return embedded_reward()
        return self._made(node.id, node, [], {})

    def _called(self, node: ast.Call) -> Reward:
        if any(isinstance(argument, ast.Starred) for argument in node.args) or None in [k.arg for k in node.keywords]:
            raise self._wrong(node, "has * or ** among its arguments, which a formula doesn't")
        positional = [self.value(argument) for argument in node.args]
        named = {str(keyword.arg): self.value(keyword.value) for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute):
            if node.func.attr not in _METHODS:
                raise self._wrong(node, f"has the method {node.func.attr!r}; there are {' and '.join(_METHODS)}")
            reward = self._operand(node.func.value)
            if not isinstance(reward, Reward):
                raise self._wrong(node, f"asks the number {reward} for {node.func.attr!r}; a reward has it")
            return self._tried(node, getattr(reward, node.func.attr), positional, named)
        if not isinstance(node.func, ast.Name):
            raise self._wrong(node, "is not a call of a reward's name")
        return self._made(node.func.id, node, positional, named)

    def _made(self, name: str, node: ast.expr, positional: list[Any], named: dict[str, Any]) -> Reward:
        if name not in self.names:
            near = difflib.get_close_matches(name.lower(), [*self.names, EMBEDDED], n=3)
            hint = f"near are {', '.join(near)}" if near else "there are, among others, coherence, grammar and keywords"
            nor = " and no directory of that name" if name == self.text.strip() else ""
            raise ValueError(
                f"reward={shown(self.text)}: there is no reward {name!r}{nor}; {hint} (textgym rewards lists all)"
            )
        return self._tried(node, getattr(rewards, self.names[name]), positional, named)

    def _tried(self, node: ast.expr, call: Callable[..., Any], positional: list[Any], named: dict[str, Any]) -> Reward:
        signature = inspect.signature(call)
        try:
            bound = signature.bind(*positional, **named)
        except TypeError as error:
            raise self._wrong(node, f"does not fit its arguments ({written(signature)}): {error}") from error
        for name, value in bound.arguments.items():
            if "RewardLike" in str(signature.parameters[name].annotation):
                bound.arguments[name] = _opened(value)
        try:
            made: Reward = call(*bound.args, **bound.kwargs)
        except (TypeError, ValueError, AttributeError) as error:
            raise self._wrong(node, f"is refused: {error}") from error
        return made

    def _combined(self, node: ast.BinOp) -> Any:
        left, right = self._operand(node.left), self._operand(node.right)
        try:
            return _SIGNS[type(node.op)](left, right)
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise self._wrong(node, f"can't be computed: {error}") from error

    def _operand(self, node: ast.expr) -> Any:
        """A number or a reward."""
        value = self.value(node)
        if isinstance(value, str):
            return reward_named(value)
        if isinstance(value, bool) or not isinstance(value, (int, float, Reward)):
            raise self._wrong(node, "is neither a number nor a reward")
        return value

    def _wrong(self, node: ast.expr, problem: str) -> ValueError:
        return ValueError(f"reward={shown(self.text)}: {ast.unparse(node)} {problem}")


def _opened(value: Any) -> Any:
    """The argument of a reward that takes rewards, with those opened that are texts."""
    if isinstance(value, list):
        return [_opened(item) for item in value]
    if isinstance(value, dict):
        return {key: _opened(item) for key, item in value.items()}
    return reward_named(value) if isinstance(value, str) else value


def _is_reward(name: str) -> bool:
    found = getattr(rewards, name)
    return inspect.isclass(found) and issubclass(found, Reward)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
