"""A language model from scratch, so small that it learns in seconds: for games, lessons and tests of ideas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import Unigram
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgym.checks import check_int, check_seed, check_texts
from textgym.language_model import LanguageModel

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def small_model(
    pieces: Sequence[str],
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    context: int = 128,
    seed: int = 0,
) -> LanguageModel:
    """A Llama with random weights, whose tokens are the given pieces of text. ::

        >>> model = small_model([*"0123456789", " higher", " lower", "."])
        >>> model.tokenizer.tokenize("16. lower")
        ['1', '6', '.', ' lower']
        >>> model.tokenizer.decode(model.encode("16. lower"))
        '16. lower'

    A text is cut into as few pieces as possible. What no piece has is ``<unk>``.

    :param pieces: different texts, each a token; spaces count
    :param hidden_size: width of its layers, a multiple of twice the number of heads
    :param layers: how many it has
    :param heads: of its attention
    :param context: most tokens that it reads
    :param seed: of its weights
    :raises ValueError: if pieces repeat or are empty, or a size is impossible
    """
    texts = check_texts("pieces", pieces, least=2)
    repeated = [piece for i, piece in enumerate(texts) if piece in texts[:i]]
    wrong = [piece for piece in texts if not piece or piece in SPECIAL]
    if wrong or repeated:
        raise ValueError(
            f"pieces must be different texts, none of them empty or one of {', '.join(SPECIAL)}; "
            f"{(wrong or repeated)[0]!r} is {'one of these' if wrong else 'there twice'}"
        )
    check_int("hidden_size", hidden_size, 1)
    check_int("layers", layers, 1)
    check_int("heads", heads, 1)
    check_int("context", context, 2)
    if hidden_size % (2 * heads):
        raise ValueError(f"hidden_size={hidden_size} must be a multiple of twice the number of heads={heads}")
    # Each piece costs the same, so the best division is that into the fewest.
    made = Tokenizer(Unigram([(text, 0.0 if text in SPECIAL else -1.0) for text in (*SPECIAL, *texts)], unk_id=3))
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(texts),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(check_seed("seed", seed) or 0)
        return LanguageModel(LlamaForCausalLM(config), tokenizer)
