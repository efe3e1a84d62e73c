"""The text of a token prefix: finished characters stay, an unfinished one is left out until it is whole.

A character beyond ASCII has two to four bytes of UTF-8, and many tokenizers write some of them as tokens for single
bytes. A text that ends between two of these tokens has no text for the last ones yet. Tokenizers show U+FFFD there, and
SentencePiece's shows it for all bytes in a row, so that characters that were whole before are broken, too.

Here the texts of all prefixes of a row are prefixes of the text of the whole row. U+FFFD stands only where the
bytes are not UTF-8 whatever follows.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes of UTF-8


class PrefixDecoder:
    """Decodes prefixes with one tokenizer, whatever it does with bytes.

    :param tokenizer: a tokenizer
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def texts(self, rows: list[list[int]]) -> list[str]:
        """The texts of B rows of ids."""
        if self._byte_of:
            return self._decode([self._whole_bytes(row) for row in rows])
        texts = self._decode(rows)
        return [
            self._without_unfinished(text, row) if text.endswith(REPLACEMENT) else text
            for text, row in zip(texts, rows, strict=True)
        ]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        """Texts as the tokenizer decodes them."""
        if not rows:
            return []  # transformers takes an empty batch for one empty text
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # SentencePiece's byte fallback: 256 tokens "<0x00>" to "<0xFF>"

    @cached_property
    def _byte_of(self) -> dict[int, int]:
        """The byte of each token for a single one; empty where the tokenizer has no byte fallback."""
        vocabulary = self.tokenizer.get_vocab()
        found = {vocabulary[name]: byte for byte in range(256) if (name := f"<0x{byte:02X}>") in vocabulary}
        if len(found) < 256:
            return {}
        letter = next(i for i, byte in found.items() if byte == ord("A"))
        return found if self._decode([[letter]]) == ["A"] else {}

    @cached_property
    def _token_of(self) -> list[int]:
        """The token of each byte."""
        return [i for i, _ in sorted(self._byte_of.items(), key=lambda item: item[1])]

    def _whole_bytes(self, row: list[int]) -> list[int]:
        """The row with every run of byte tokens made UTF-8, which the tokenizer then decodes character by character."""
        if self._byte_of.keys().isdisjoint(row):
            return row
        whole: list[int] = []
        run = bytearray()
        for token in row:
            byte = self._byte_of.get(token)
            if byte is not None:
                run.append(byte)
                continue
            if run:
                whole += self._tokens(run.decode("utf-8", "replace"))
                run.clear()
            whole.append(token)
        # The last run may go on: its unfinished character is left out.
        return whole + self._tokens(codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(run)))

    def _tokens(self, text: str) -> list[int]:
        return [self._token_of[byte] for byte in text.encode("utf-8")]

    # Byte-level BPE: every token is a string of bytes

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in repr(getattr(backend, "decoder", None))

    def _without_unfinished(self, text: str, row: Sequence[int]) -> str:
        """A text that ends in U+FFFD, without it where the bytes are the beginning of a character."""
        if not self._is_byte_level:
            return text.rstrip(REPLACEMENT)  # what it stands for is not known: it may be such a beginning
        tail = b""
        for token in reversed(row[-_LONGEST_CHARACTER:]):
            written = self._bytes(token)
            if written is None:
                break
            tail = written + tail
        # A slice of the text can begin inside a character; its leftovers are replaced, and don't matter at the end.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)
        return text[: -len(REPLACEMENT)] if decoder.getstate()[0] else text

    def _bytes(self, token: int) -> bytes | None:
        """The bytes of a token; None for one that was added, such as a special token."""
        if token in self.tokenizer.added_tokens_decoder:
            return None
        written = self.tokenizer.convert_ids_to_tokens(token)
        return None if written is None else bytes(_BYTE_LEVEL.get(c, 0) for c in str(written))


def _byte_level_alphabet() -> dict[str, int]:
    """The characters in which byte-level BPE writes bytes: Latin-1's printable ones as they are, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
