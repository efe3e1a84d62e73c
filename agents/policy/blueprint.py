"""The architecture and tokenizer of a language model without its weights: what is saved with an agent.

Stable-Baselines3 saves weights as state dicts and rebuilds the network from constructor arguments. A language
model's constructor argument is usually a path or an object; neither may stand in a file that is opened on
another machine.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from textgym.language_model import LanguageModel
from textgym.model_sources import auto_class, resolve_dtype
from textgym.vocabulary import listed_ends


@dataclass(frozen=True, repr=False)
class LanguageModelBlueprint:
    """What it takes to build a language model again, weights aside.

    :param files: name and content of ``config.json`` and the tokenizer's files, as ``save_pretrained`` writes
        them
    :param tokenizer_class: of the tokenizer; ``AutoTokenizer`` would guess it from the model's architecture
    :param dtype: type of the weights, such as ``"float32"``
    :param name: what the model was loaded from, for messages
    :param ends: tokens that end a turn, as the model's generation configuration lists them; none where it has none
    """

    files: dict[str, bytes]
    tokenizer_class: type[PreTrainedTokenizerBase]
    dtype: str
    name: str
    ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, language_model: LanguageModel) -> LanguageModelBlueprint:
        """The blueprint of a language model."""
        with tempfile.TemporaryDirectory() as folder:
            language_model.model.config.save_pretrained(folder)
            language_model.tokenizer.save_pretrained(folder)
            root = Path(folder)
            files = {
                path.relative_to(root).as_posix(): path.read_bytes()
                for path in sorted(root.rglob("*"))
                if path.is_file()
            }
        dtype = str(language_model.model.dtype).removeprefix("torch.")
        name = language_model.name
        name = Path(name).name if Path(name).is_absolute() else name  # a path means nothing on another machine
        return cls(
            files,
            type(language_model.tokenizer),
            dtype,
            name,
            tuple(listed_ends(getattr(language_model.model, "generation_config", None))),
        )

    def build(self) -> LanguageModel:
        """The language model with random weights, on the CPU; the random state is left as it was."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = self.tokenizer_class.from_pretrained(folder, trust_remote_code=False)
        with torch.random.fork_rng(devices=[]):
            model = auto_class(config).from_config(config, dtype=resolve_dtype(self.dtype))
        if self.ends:
            model.generation_config = GenerationConfig(eos_token_id=list(self.ends))
        return LanguageModel(model, tokenizer, self.name)

    def __repr__(self) -> str:
        # SB3 writes the repr of what it pickles into the zip as text: keep the files' bytes out of it.
        return f"LanguageModelBlueprint(name={self.name!r}, dtype={self.dtype!r}, files={sorted(self.files)})"
