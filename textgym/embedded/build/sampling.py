"""Samples texts from a language model: from its full distribution, or from one that is narrowed to known words."""

import math
import re

import sentencepiece
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from . import tokenizer

_LETTER = re.compile(r"[a-z0-9'&]")


class KnownWords:
    """Which pieces may follow in a text whose words are all in a list, given the letters of the word begun so far.

    A word ends at a space or at a punctuation mark; a hyphen may also join two known words.

    :param known: the words, in lower case
    :param pieces: the pieces that texts are made of
    """

    def __init__(self, known: set[str], pieces: sentencepiece.SentencePieceProcessor) -> None:
        self.known = {word for word in known if word[0].isalnum()}
        self.beginnings = {word[:i] for word in self.known for i in range(len(word) + 1)}
        self.pieces = [pieces.id_to_piece(i) for i in range(len(pieces))]
        usable = [
            i for i in range(len(pieces)) if not (pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i))
        ]
        # for most pieces one look is enough, instead of one a letter
        self._letters = [i for i in usable if all(_LETTER.match(letter) for letter in self.pieces[i])]
        others = sorted(set(usable) - set(self._letters))
        self._new_words = [i for i in others if self.pieces[i][0] == "▁" and self.after("", i) is not None]
        self._mixed = [i for i in others if self.pieces[i][0] != "▁"]
        self._allowed: dict[str, Tensor] = {}

    def after(self, begun: str, piece: int) -> str | None:
        """Return the letters of the word that a piece leaves unfinished, None if it makes an unknown word."""
        for letter in self.pieces[piece]:
            if _LETTER.match(letter) or (letter == "-" and begun + letter in self.beginnings):
                begun += letter
                if begun not in self.beginnings:
                    return None
            elif begun and begun not in self.known:
                return None
            else:  # a space, a mark, or the hyphen between two words
                begun = ""
        return begun

    def allowed(self, begun: str) -> Tensor:
        """Return which pieces may follow the letters ``begun``: bool, [V]."""
        if begun not in self._allowed:
            between_words = not begun or begun in self.known
            mask = torch.zeros(len(self.pieces), dtype=torch.bool)
            mask[[i for i in self._letters if begun + self.pieces[i] in self.beginnings]] = True
            mask[[i for i in self._mixed if self.after(begun, i) is not None]] = True
            mask[[*self._new_words, tokenizer.EOS]] = between_words
            self._allowed[begun] = mask
        return self._allowed[begun]


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM,
    rows: int,
    seed: int,
    max_tokens: int = 64,
    temperature: float = 1.0,
    known_words: KnownWords | None = None,
) -> list[list[int]]:
    """Return the pieces of ``rows`` samples with no prompt, without ``<s>`` and ``</s>``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), tokenizer.BOS)  # [B, L]
    ended = torch.zeros(rows, dtype=torch.bool)
    begun: list[str] = [""] * rows
    cache = None
    tokens = ids
    for _ in range(max_tokens):
        out = model(tokens, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[:, -1].float() / temperature  # [B, V]
        if known_words is not None:
            logits = logits.masked_fill(~torch.stack([known_words.allowed(letters) for letters in begun]), -math.inf)
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens[ended] = tokenizer.PAD
        ended |= tokens[:, 0] == tokenizer.EOS
        if known_words is not None:
            for row in (~ended).nonzero()[:, 0].tolist():
                begun[row] = known_words.after(begun[row], int(tokens[row])) or ""
        ids = torch.cat([ids, tokens], dim=1)
        if ended.all():
            break
    return [[i for i in row[1:] if i not in (tokenizer.EOS, tokenizer.PAD)] for row in ids.tolist()]
