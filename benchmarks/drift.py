"""How often drift alarms, on real predictions: 200 random splits of rows that a model has not seen, and shifted ones.

``python benchmarks/drift.py`` trains a logistic regression on 300 of scikit-learn's digits, and splits the other 1,497
into 400 rows to compare with and 1,000 new ones. Takes a minute.
"""

from collections.abc import Callable

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lightning_modules.callbacks.drift import compared

SPLITS = 200


def predictions() -> tuple[Tensor, Tensor]:
    """Probabilities (N, 10) and labels (N,) of the digits that the model has not seen."""
    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(x))
    model = LogisticRegression(max_iter=200).fit(x[rows[:300]] / 16, y[rows[:300]])
    found = torch.from_numpy(model.predict_proba(x[rows[300:]] / 16)).float()
    return found, torch.from_numpy(y[rows[300:]])


def reference(found: Tensor) -> dict[str, object]:
    """What a checkpoint keeps."""
    if found.ndim == 1:
        return {"scores": found, "rows": len(found)}
    counts = found.argmax(1).bincount(minlength=10)
    return {"scores": found.max(1).values, "rows": len(found), "counts": counts, "names": [str(c) for c in range(10)]}


def alarms(found: Tensor, alpha: float, change: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> tuple[str, str]:
    """Splits with a significant test, and with drift, in percent."""
    generator, hits = torch.Generator().manual_seed(0), []
    for _ in range(SPLITS):
        rows = torch.randperm(len(found), generator=generator)[:1400]
        facts = compared(reference(found[rows[:400]]), change(found[rows[400:]], labels[rows[400:]]), alpha, 0.1)
        hits.append((any(test["significant"] for test in facts["tests"]), facts["drift"]))
    significant, drift = 100 * np.mean(hits, axis=0)
    return f"{significant:.1f} %", f"{drift:.1f} %"


def main() -> None:
    """Print the table, in Markdown."""
    found, labels = predictions()
    scores = found[:, 0].logit()  # a 0 is an anomaly
    changes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "none": lambda new, _: new,
        "zeros twice as many": lambda new, y: torch.cat([new, new[y == 0]]),
        "no threes": lambda new, y: new[y != 3],
        "no threes, no sevens": lambda new, y: new[(y != 3) & (y != 7)],
    }
    print("| model | shift | alpha | significant | drift |\n| --- | --- | --- | --- | --- |")
    for name, values in (("classifier", found), ("detector", scores)):
        for shift, change in changes.items():
            for alpha in (0.01, 0.05) if shift == "none" else (0.01,):
                print(
                    f"| {name} | {shift} | {alpha} | {' | '.join(alarms(values, alpha, change, labels))} |", flush=True
                )


if __name__ == "__main__":
    main()
