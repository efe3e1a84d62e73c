"""The tokenizer: SentencePiece, unigram, 4,096 pieces, byte fallback, nothing normalised.

SentencePiece trains it and ``tokenizer.model`` is its own file. Hugging Face gets the same pieces and scores
as a ``tokenizers`` Unigram model in ``tokenizer.json``; the tests hold the two to the same ids. Differences
that remain on purpose: Hugging Face puts ``<s>`` before a text unless ``add_special_tokens=False``, and reads
the literal strings ``<s>``, ``</s>``, ``<pad>`` and ``<unk>`` as the special tokens.

Text is encoded as written: upper case as letters, other scripts as UTF-8 bytes, every space as "▁". One space
(the dummy prefix) is put before the text, so that a first word is the same piece as elsewhere, and decoding
takes one space off again. Texts round trip without loss; only the character "▁" (U+2581) itself comes back as
a space.
"""

import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from .sources import CACHE

UNK, BOS, EOS, PAD = 0, 1, 2, 3
SIZE = 4096
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
MARKS = ".,;:!?'\"-()&/$%#@*+=<>[]{}_~^`|\\"
FOLDER = CACHE / "tokenizer"


def train(texts: list[str], folder: Path = FOLDER) -> None:
    """Train the pieces on ``texts``; write ``tokenizer.model`` and the Hugging Face files to ``folder``."""
    if (folder / "tokenizer.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "pieces"),
        model_type="unigram",
        vocab_size=SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=LETTERS + MARKS,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        unk_id=UNK,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        num_threads=2,
        minloglevel=1,
    )
    (folder / "pieces.vocab").unlink()
    (folder / "pieces.model").rename(folder / "tokenizer.model")
    write_hugging_face_files(folder)


def write_hugging_face_files(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` with the pieces of ``tokenizer.model``."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=UNK, byte_fallback=True))
    # no pre-tokenizer: SentencePiece, too, looks for the best pieces of the whole text and not word by word
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load(folder: Path = FOLDER) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def copy_files(destination: Path) -> None:
    """Copy all tokenizer files into a model's folder."""
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, destination / name)
