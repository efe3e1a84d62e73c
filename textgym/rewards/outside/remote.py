"""Reward models that are served elsewhere, over HTTP."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from typing_extensions import Unpack

from textgym.checks import check_choice, check_int
from textgym.handed_on import hands_on
from textgym.json_client import ClientArguments, JsonClient, RemoteError, as_json, quoted
from textgym.rewards.base import Reward
from textgym.rewards.errors import RewardError

Protocol = Literal["openrlhf", "vllm"]


@hands_on(JsonClient)
class RemoteReward(Reward):
    """Scores from a server, over one of two JSON protocols.

    ``"openrlhf"``: that of OpenRLHF's reward server, which ``textgym serve-reward`` speaks, too. POST
    ``{"query": [prompt and completion together], "prompts": [...], "labels": [...]}``, answered by
    ``{"rewards": [...]}``. A reward may be null: not applicable.

    ``"vllm"``: vLLM's ``/classify``. POST ``{"model": ..., "input": [prompt and completion together]}``, answered by
    ``{"data": [{"index": 0, "probs": [...]}, ...]}``. Φ is the probability of class ``label``.

    Texts go out in batches, several at once. A server that is busy or can't be reached is asked again, as
    :class:`~textgym.json_client.JsonClient` does it, which also says what the further arguments mean. Anything else
    that is not one finite number (or null) for each text raises :class:`RewardError`, and so does a server that stays
    away; training state is untouched by that, and scoring can be tried again.

    Range: whatever is served; [0, 1] for ``"vllm"``.

        >>> from textgym.rewards import FunctionReward, RewardServer
        >>> length = FunctionReward(lambda completions: [len(text) for text in completions])
        >>> with RewardServer(length) as server:
        ...     RemoteReward(server.url)(prompts=["the film", "a"], completions=[" is warm", ""])
        [8.0, 0.0]

    :param url: where to POST to, such as ``http://gpu-box:8700/get_reward``
    :param protocol: ``"openrlhf"`` or ``"vllm"``
    :param label_column: ``"openrlhf"``: the column of the prompt rows that is sent as ``labels``; without it they are
        empty texts
    :param model: ``"vllm"``: the name of the served model; None leaves it out
    :param label: ``"vllm"``: which class
    :param batch_size: texts per request
    :raises ValueError: if an argument is impossible
    """

    def __init__(
        self,
        url: str,
        protocol: Protocol = "openrlhf",
        *,
        label_column: str | None = None,
        model: str | None = None,
        label: int = 1,
        batch_size: int = 64,
        **arguments: Unpack[ClientArguments],
    ) -> None:
        check_choice("protocol", protocol, get_args(Protocol))
        self.protocol = protocol
        self.label_column = label_column
        self.model = model
        self.label = check_int("label", label, low=0)
        self.batch_size = check_int("batch_size", batch_size, low=1)
        self._client = JsonClient(url, **arguments)
        self.url = url

    @property
    def name(self) -> str:
        return f"remote {self._client.host}"

    def __call__(self, /, *, prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        if not completions:
            return []
        labels: list[Any] = [""] * len(prompts)
        if self.label_column is not None:
            if self.label_column not in columns:
                available = ", ".join(["prompts", "completions", *columns])
                raise RewardError(
                    self.name,
                    f"needs {self.label_column!r}, which the prompts have no column for; available: {available}",
                )
            labels = list(columns[self.label_column])
        queries = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        batches = [slice(start, start + self.batch_size) for start in range(0, len(queries), self.batch_size)]
        bodies = [self._content(queries[batch], prompts[batch], labels[batch]) for batch in batches]

        def read(number: int, answer: Any) -> list[float | None]:
            return self._scores(answer, completions[batches[number]], batches[number].start)

        try:
            return [score for scores in self._client.ask_all(bodies, read) for score in scores]
        except RemoteError as error:
            raise RewardError(self.name, str(error)) from error

    def _content(self, queries: list[str], prompts: list[str], labels: list[Any]) -> bytes:
        """What is sent for one batch."""
        if self.protocol == "openrlhf":
            content: dict[str, Any] = {"query": queries, "prompts": prompts, "labels": labels}
        else:
            content = {"input": queries} if self.model is None else {"model": self.model, "input": queries}
        try:
            return as_json(content)
        except (TypeError, ValueError) as error:
            raise RewardError(self.name, f"the column {self.label_column!r} can't be sent as JSON: {error}") from error

    def _scores(self, answer: Any, completions: list[str], start: int) -> list[float | None]:
        """The scores in an answer to a batch, whose first row is row ``start`` of the call."""
        values = self._rewards(answer) if self.protocol == "openrlhf" else self._probabilities(answer)
        if len(values) != len(completions):
            raise RewardError(self.name, f"{self.url} answered with {len(values)} scores for {len(completions)} texts")
        scores: list[float | None] = []
        for i, value in enumerate(values):
            if value is not None and not _is_finite(value):
                problem = f"{self.url} answered with {value!r}; expected one finite number or null for each text"
                raise RewardError(self.name, problem, row=start + i, completion=completions[i])
            scores.append(None if value is None else float(value))
        return scores

    def _rewards(self, answer: Any) -> list[Any]:
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list):
            raise RewardError(self.name, f'{self.url} answered without a list of "rewards": {quoted(answer)}')
        return rewards

    def _probabilities(self, answer: Any) -> list[Any]:
        data = answer.get("data") if isinstance(answer, dict) else None
        try:
            if not isinstance(data, list):
                raise TypeError("no list of data")
            by_index = {item["index"]: item["probs"] for item in data}
            if sorted(by_index) != list(range(len(data))):
                raise ValueError(f"the indices are {sorted(by_index)}")
            probabilities = [by_index[i] for i in range(len(data))]
        except (TypeError, KeyError, ValueError) as error:
            raise RewardError(
                self.name, f"{self.url} did not answer as vLLM's /classify does ({error!r}): {quoted(answer)}"
            ) from error
        for row in probabilities:
            if not isinstance(row, list) or len(row) <= self.label:
                raise RewardError(self.name, f"label={self.label}, but {self.url} answered with probs={quoted(row)}")
        return [row[self.label] for row in probabilities]


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False
