"""Conversations that are texts already: what is written in a chat template, read back as messages."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textgym.chat.turns import TurnTokens

_CONTENT = "Qz{}z"  # stands in no template by chance


class TemplatedTexts:
    """What a chat template writes around contents, found out by running it.

    :param turns: of the tokenizer whose template it is
    """

    def __init__(self, turns: TurnTokens) -> None:
        self._turns = turns

    def are_opened(self, text: str) -> bool:
        """Whether a text begins as the template begins a conversation; never where it begins with a content."""
        return text.startswith(self._openings)

    def messages(self, text: str) -> list[dict[str, Any]] | None:
        """The conversation that a prompt is in the template, at whose end the assistant is to answer.

        Whoever wants to be sure runs the template on it again: contents that look like headers are read as such.

        :return: None where the text is not one
        """
        bos = str(self._turns.tokenizer.bos_token or "")
        text = text.removeprefix(bos)  # which prompts are without where the tokenizer puts it there, too
        for first, written in self._first.items():
            opening = written.removeprefix(bos)
            if opening.strip() and text.startswith(opening):
                found = self._read(text, len(opening), first)
                if found is not None:
                    return found
        return None

    def _read(self, text: str, at: int, role: str) -> list[dict[str, Any]] | None:
        """The messages from a place on, at which a role's content begins."""
        messages, answering = [], self._turns.answer_opening
        if not answering or not text.endswith(answering):
            return None
        end = len(text) - len(answering)
        while at <= end:
            places = [(text.find(between, at, end), between, after) for between, after in self._between[role]]
            place, between, after = min((found for found in places if found[0] >= 0), default=(end, "", ""))
            messages.append({"role": role, "content": text[at:place]})
            if not after:
                return messages if role == "user" else None
            at, role = place + len(between), after
        return None

    @cached_property
    def _openings(self) -> tuple[str, ...]:
        return tuple(opening for opening in self._first.values() if opening.strip())

    @cached_property
    def _first(self) -> dict[str, str]:
        """What stands before the first content, by who says it."""
        found = {}
        for roles in (("system", "user"), ("user",)):
            parts = self._parts(*roles)
            if parts is not None:
                found[roles[0]] = parts[0]
        return found

    @cached_property
    def _between(self) -> dict[str, list[tuple[str, str]]]:
        """What may stand after a content, by who says it, and who speaks then."""
        found: dict[str, list[tuple[str, str]]] = {"system": [], "user": [], "assistant": []}
        for roles in (("system", "user"), ("user", "assistant", "user")):
            parts = self._parts(*roles)
            for before, after, between in zip(roles, roles[1:], [] if parts is None else parts[1:], strict=False):
                if between:
                    found[before].append((between, after))
        return found

    def _parts(self, *roles: str) -> list[str] | None:
        """The template's text around the contents of a conversation that the assistant is to go on with."""
        contents = [_CONTENT.format(i) for i in range(len(roles))]
        text = self._turns.rendered(
            [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        )
        if text is None:
            return None
        parts = []
        for content in contents:
            part, found, text = text.partition(content)
            if not found:
                return None
            parts.append(part)
        return [*parts, text]
