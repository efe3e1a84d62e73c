"""The prompts: the first three to six words of snippets that no model was fitted to.

Train prompts are the beginnings of the validation snippets, test prompts those of the test snippets. Taken
out are prompts with a word that the training text does not have, and test prompts that begin a train snippet
or a train prompt, or are begun by one.
"""

import random
import re
import zlib
from array import array
from pathlib import Path

from .language_model import _UNWANTED
from .sources import movie_snippets
from .text import words

LENGTHS = (3, 4, 5, 6)


def beginnings(text: str) -> list[str]:
    """Return the beginnings of ``LENGTHS`` words, without punctuation after the last word."""
    tokens = text.split()
    return [re.sub(r"[\s.,;:!?-]+$", "", " ".join(tokens[:count])) for count in LENGTHS if len(tokens) >= count]


def build(folder: Path) -> None:
    """Write ``train.txt`` and ``test.txt``, one prompt a line, and checksums of the train snippets' beginnings."""
    snippets = movie_snippets()
    known = {word for s in snippets["train"] for word in words(s.text)}
    trained_on = {beginning for s in snippets["train"] for beginning in beginnings(s.text)}

    def prompts(split: str) -> list[str]:
        rng = random.Random(split)
        found = []
        for snippet in snippets[split]:  # type: ignore[index]
            count = rng.choice(LENGTHS)
            if len(snippet.text.split()) < count + 3 or _UNWANTED.search(snippet.text):
                continue
            prompt = beginnings(snippet.text)[count - LENGTHS[0]]
            if set(words(prompt)) <= known and len(prompt.split()) >= LENGTHS[0]:
                found.append(prompt)
        return list(dict.fromkeys(found))

    train = prompts("validation")
    train_beginnings = {beginning for prompt in train for beginning in [prompt, *beginnings(prompt)]}
    test = [
        prompt
        for prompt in prompts("test")
        if prompt not in trained_on | train_beginnings and not set(beginnings(prompt)) & set(train)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n".join(train) + "\n")
    (folder / "test.txt").write_text("\n".join(test) + "\n")
    checksums = array("I", sorted({zlib.crc32(beginning.encode()) for beginning in trained_on}))
    (folder / "trained_on.crc32").write_bytes(checksums.tobytes())
    print(f"prompts: {len(train)} train, {len(test)} test", flush=True)
