"""The independent judge: TF-IDF of words and word pairs with ridge regression on the human scores.

It is not a neural network, it shares no weights or tokens with the reward model, and it was fit to human scores
alone. When training a policy raises the reward model's score and the judge's score does not move, the reward
was gamed.
"""

import csv
import io
import json
from pathlib import Path

from .sources import movie_snippets

TOKEN_PATTERN = r"[a-z0-9]+(?:'[a-z]+)?"
FEATURES = 15_000
EXAMPLES = [
    "a warm, funny and moving film.",
    "a dull, lifeless and utterly predictable mess.",
    "The film is not bad, but it isn't very good either.",
    "one of the best films of the year",
    "zzz qqq",
    "",
]


def build(folder: Path) -> None:
    """Fit the judge and write ``weights.tsv`` (term, idf, weight) and ``judge.json`` to ``folder``."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    train = movie_snippets()["train"]
    vectorizer = TfidfVectorizer(
        token_pattern=TOKEN_PATTERN, ngram_range=(1, 2), min_df=2, max_features=FEATURES, sublinear_tf=True
    )
    features = vectorizer.fit_transform([s.text for s in train])
    regression = Ridge(alpha=1.5).fit(features, [s.score for s in train])
    terms = vectorizer.get_feature_names_out()
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE)
    for term, idf, weight in zip(terms, vectorizer.idf_, regression.coef_, strict=True):
        writer.writerow([term, f"{idf:.5f}", f"{weight:.5f}"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.tsv").write_text(table.getvalue())
    reference = regression.predict(vectorizer.transform(EXAMPLES)).tolist()
    about = {
        "token_pattern": TOKEN_PATTERN,
        "intercept": float(regression.intercept_),
        "sklearn_predictions": dict(zip(EXAMPLES, reference, strict=True)),
    }
    (folder / "judge.json").write_text(json.dumps(about, indent=1) + "\n")
