"""What a reply adds to a text: in a chat template with the template's own tokens around it, elsewhere as it is.

Tokens that were sampled stay as they are. What follows them is found by rendering the conversation with a placeholder
for the turn that ended: what the template writes after the placeholder comes after the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from textgym.chat.turns import TurnTokens

# Stands in no conversation by chance.
_TURN = "QzaTurnQza"
# Texts whose tokens stay as they are whatever follows; each fails for some piece, where both merge into one token.
ANCHORS = ("\n", ".", "a", "0", " ")


class BetweenTurns:
    """Between the policy's turns, for one tokenizer.

    :param turns: what opens and ends a turn
    """

    def __init__(self, turns: TurnTokens) -> None:
        self.turns = turns

    def check(self, role: str) -> None:
        """Judge the chat template.

        :param role: of the replies
        :raises ValueError: if it refuses such conversations or does not leave earlier turns as they were
        """
        question = {"role": "user", "content": "Qzu"}
        self.closing([question], {"role": role, "content": "Qzr"})
        answered = [question, {"role": "assistant", "content": "Qzb"}, {"role": role, "content": "Qzr"}]
        self.closing(answered, {"role": role, "content": "Qzs"})

    def closing(
        self, messages: Sequence[Mapping[str, Any]], reply: Mapping[str, Any], tools: Any = None, opens: bool = True
    ) -> str:
        """What the chat template writes after the assistant's turn: its end, a reply, and the next turn's opening.

        :param messages: the conversation that the turn answers; where its last message is the assistant's, it is the
            beginning of the turn
        :param reply: the message after the turn
        :param tools: descriptions of tools, for the template
        :param opens: whether another turn follows
        :raises ValueError: if the template refuses the conversation, or writes what was said before in another way
            once there is more
        """
        earlier, begun = list(messages), ""
        if earlier and earlier[-1]["role"] == "assistant":
            begun = str(earlier.pop()["content"])
        turn = {"role": "assistant", "content": begun + _TURN}
        head, found, tail = self._rendered([*earlier, turn, reply], tools, add_generation_prompt=opens).partition(_TURN)
        if begun:
            last = {"role": "assistant", "content": begun}
            before = self._rendered([*earlier, last], tools, add_generation_prompt=False, continue_final_message=True)
        else:
            before = self._rendered(earlier, tools)
        if not found or head != before:
            raise ValueError(
                "the chat template writes earlier turns in another way once the conversation goes on, so it can't be "
                "continued token by token: give a template that leaves them as they were, or prompts that are plain "
                "texts"
            )
        return tail

    def _rendered(self, messages: list[Mapping[str, Any]], tools: Any, **options: Any) -> str:
        text = self.turns.rendered(messages, **options, tools=tools or None)
        if text is None:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ValueError(
                f"the tokenizer's chat template refuses a conversation of the roles {roles}; give a template that "
                "takes them, a reply with another role (role='user' or 'tool'), or prompts that are plain texts"
            )
        return text

    def ids(self, closing: str, last: int) -> list[int]:
        """Token ids of :meth:`closing`, without the end of turn where the turn has it already.

        :param closing: what :meth:`closing` gave
        :param last: the turn's last token
        """
        ids = self._encoded(closing)
        if ids and ids[0] not in self.turns.special_ids:
            # Nothing ends a turn for certain here: the tokens are those after a text, not those of one.
            for anchor in ANCHORS:
                start, both = self._encoded(anchor), self._encoded(anchor + closing)
                if both[: len(start)] == start:
                    return both[len(start) :]
        return ids[1:] if ids and ids[0] == last else ids

    def _encoded(self, text: str) -> list[int]:
        return list(self.turns.tokenizer(text, add_special_tokens=False)["input_ids"])
