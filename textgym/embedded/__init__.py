"""The models, prompts and judge that come with textgym, so that everything runs with nothing downloaded.

- ``LANGUAGE_MODEL``: folder of a small causal language model that writes lower-case movie-review sentences;
  opens with ``AutoModelForCausalLM`` and ``AutoTokenizer``.
- ``REWARD_MODEL``: folder of a small causal reward model on the same tokenizer; opens with
  ``AutoModelForSequenceClassification``. The tanh of its one logit (``config.reward_activation``) is a
  sentiment between -1 and 1: the human rating of the text, from -4 to 4, divided by 4. Read at a token inside
  a text it estimates the rating of the finished text; after ``</s>`` it is the rating of the text.
- ``load_prompts("train" | "test")``: beginnings of review snippets that no model was fitted to.
- ``WordSentiment``: a bag-of-words judge of sentiment, fit to the human ratings, independent of the reward
  model.

``python -m textgym.embedded.build`` makes all of it; ``REPORT.md`` has the measurements, ``NOTICE.md`` the
sources.
"""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from textgym.checks import check_choice

__all__ = ["LANGUAGE_MODEL", "REWARD_MODEL", "WordSentiment", "load_prompts"]

_FOLDER = Path(__file__).resolve().parent
LANGUAGE_MODEL: Path = _FOLDER / "language_model"
REWARD_MODEL: Path = _FOLDER / "reward_model"


def load_prompts(split: Literal["train", "test"]) -> list[str]:
    """Return the prompts of one split: lower-case beginnings, three to six words long, of review snippets.

    :param split: "train", or "test" for prompts that are kept for evaluation
    :raises ValueError: for any other ``split``
    """
    check_choice("split", split, ("train", "test"))
    return (_FOLDER / "prompts" / f"{split}.txt").read_text(encoding="utf-8").splitlines()


class WordSentiment:
    """A linear bag-of-words judge of sentiment, fit to human ratings by ridge regression.

    A reward function with TRL's signature. It scores prompt and completion together, on the raters' scale
    from -4 (worst) to 4 (best); a text without any known word gets the average rating. Order beyond word
    pairs, spelling and case are nothing to it, and it knows nothing of the reward model: use it to judge, not
    to train.

    >>> judge = WordSentiment()
    >>> good, bad = judge(prompts=["the film is "] * 2, completions=["a warm, funny delight.", "a dull mess."])
    >>> good > 0 > bad
    True
    """

    def __init__(self) -> None:
        about = json.loads((_FOLDER / "judge" / "judge.json").read_text(encoding="utf-8"))
        self._token = re.compile(about["token_pattern"])
        self._intercept: float = about["intercept"]
        self._features: dict[str, tuple[float, float]] = {}
        for line in (_FOLDER / "judge" / "weights.tsv").read_text(encoding="utf-8").splitlines():
            term, idf, weight = line.split("\t")
            self._features[term] = (float(idf), float(weight))

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Return the rating of every prompt with its completion, about -4 to 4."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts do not fit {len(completions)} completions")
        return [self.score(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def score(self, text: str) -> float:
        """Return the rating of one text, about -4 to 4."""
        tokens = self._token.findall(text.lower())
        terms = tokens + [f"{first} {second}" for first, second in pairwise(tokens)]
        counts: dict[str, int] = {}
        for term in terms:
            if term in self._features:
                counts[term] = counts.get(term, 0) + 1
        squares = total = 0.0
        for term, count in counts.items():
            idf, weight = self._features[term]
            value = (1 + math.log(count)) * idf
            squares += value * value
            total += value * weight
        return self._intercept + (total / math.sqrt(squares) if squares else 0.0)
