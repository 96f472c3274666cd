"""TF-IDF with logistic regression on the rows of a classification recipe: what a fine-tuned model has to beat.

    python benchmarks/tasks/tfidf.py topic                            on the training rows of experiment=topic
    python benchmarks/tasks/tfidf.py sentiment --rows 1000            on 1,000 of them, drawn at random
    python benchmarks/tasks/tfidf.py sentiment data.eval_fraction=0.2     other settings of the recipe

Words and pairs of words, sublinear counts; the strength of the regularization is chosen by cross-validation within the
training rows. The eval rows are those of `lora-ft eval`: the file named test if there is one.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import lora_ft
from lora_ft import config
from lora_ft.data.read import Rows, read, read_eval
from lora_ft.data.sampler import epoch_order
from lora_ft.data.sources import folder_splits
from lora_ft.evaluation.classification import Classification, Predictions, classify

STRENGTHS = [1.0, 10.0, 100.0]
FOLDS = 3


def texts_and_labels(rows: Any, template: str) -> tuple[list[str], list[str]]:
    """Return what `{text}` stood for in each prompt, and the labels."""
    before, after = template.split("{text}")
    texts, labels = [], []
    for row in rows:
        prompt = next(m["content"] for m in row.messages if m["role"] == "user")
        texts.append(prompt.removeprefix(before).removesuffix(after))
        labels.append(row.answer)
    return texts, labels


def rows_of(data: config.Data) -> tuple[Any, Any]:
    """Return training and eval rows of a recipe: the file named test, or the eval rows of the split."""
    own: Rows = read(data)
    if "test" in folder_splits(data.path, "data.path"):
        return own.training_rows, read_eval(replace(data, split="test")).rows
    return own.training_rows, own.eval_rows


def scores(train: tuple[list[str], list[str]], test: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Fit on the training rows; return accuracy and macro F1 on the others, with intervals, and seconds."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    started = time.perf_counter()
    steps = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=2000))
    search = GridSearchCV(steps, {"logisticregression__C": STRENGTHS}, cv=FOLDS, scoring="f1_macro")
    predicted = search.fit(*train).predict(test[0]).tolist()
    seconds = time.perf_counter() - started
    found = classified(test[1], predicted)
    return {"train_rows": len(train[0]), "eval_rows": found.rows, "seconds": round(seconds, 2)} | {
        key: value
        for name in ("accuracy", "macro_f1")
        for key, value in ((name, found.metrics[name]), (f"{name}_interval", found.intervals[name]))
    }


def classified(labels: Sequence[str], predicted: Sequence[str]) -> Classification:
    """Return the metrics of predictions without probabilities, by the functions that evaluate adapters."""
    names = sorted({*labels, *predicted})
    references, chosen = (np.array([names.index(label) for label in side]) for side in (labels, predicted))
    return classify(Predictions(names, np.eye(len(names))[chosen], references), seed=0)


def baseline(
    recipe: str, overrides: list[str], most_rows: int | None = None, eval_rows: int | None = None
) -> dict[str, Any]:
    """Return the scores of TF-IDF on the rows of a recipe, or on so many of them.

    eval_rows: number of eval rows, which are then those that `lora-ft eval eval.rows=N` chooses.
    """
    data = lora_ft.compose("train", [f"experiment={recipe}", *overrides]).data
    train, test = (texts_and_labels(rows, data.prompt) for rows in rows_of(data))
    return scores(drawn(*train, most_rows), drawn(*test, eval_rows))


def drawn(texts: list[str], labels: list[str], number: int | None) -> tuple[list[str], list[str]]:
    """Return so many of the rows, in the random order of `lora-ft eval`; all of them for None."""
    chosen = epoch_order(len(texts), 0, 0)[:number] if number else range(len(texts))
    return [texts[i] for i in chosen], [labels[i] for i in chosen]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of an experiment: sentiment, topic, intents")
    parser.add_argument("overrides", nargs="*", help="settings, as for lora-ft train")
    parser.add_argument("--rows", type=int, help="number of training rows; all by default")
    given = parser.parse_args(arguments)
    print(json.dumps(baseline(given.recipe, given.overrides, given.rows), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
