"""How well does the embedded ViT read digits, beside scikit-learn's SVC on the same split?

    python benchmarks/micro_vit.py [--out confusion.png]

Both learn from the train part and are graded on the test part. The peer is the classifier of
scikit-learn's own example.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.svm import SVC
from transformers import AutoImageProcessor, AutoModelForImageClassification

from colabtools.micro import vit_path
from colabtools.micro.digits import Digits, load_digits

__all__ = ["main"]

Labels = NDArray[np.int64]
SECONDS_PER_TIMING = 1.0


def load_vit() -> Callable[[Digits], Labels]:
    """Return the shipped model as a function, processor included."""
    processor = AutoImageProcessor.from_pretrained(vit_path())
    model = AutoModelForImageClassification.from_pretrained(vit_path())

    @torch.inference_mode()
    def classify(digits: Digits) -> Labels:
        batch = processor(list(digits.images), return_tensors="pt")
        return model(**batch).logits.argmax(-1).numpy()

    return classify


def fit_svc() -> Callable[[Digits], Labels]:
    """Return the peer as a function, fitted on the train part."""

    def to_features(digits: Digits) -> NDArray[np.float64]:
        return digits.images[..., 0].reshape(-1, 64) * (16 / 255)

    train = load_digits("train")
    # Source: scikit-learn examples/classification/plot_digits_classification.py, pixels in 0..16.
    svc = SVC(gamma=0.001).fit(to_features(train), train.labels)
    return lambda digits: svc.predict(to_features(digits))


def time_per_picture(classify: Callable[[Digits], Labels], digits: Digits) -> float:
    """Return the least seconds that one picture took in a batch of all of them."""
    best, stop = float("inf"), time.perf_counter() + SECONDS_PER_TIMING
    while time.perf_counter() < stop:
        started = time.perf_counter()
        classify(digits)
        best = min(best, time.perf_counter() - started)
    return best / len(digits.labels)


def report(name: str, right: NDArray[np.bool_], seconds: float) -> None:
    """Print one row: accuracy, its interval, and time."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    print(
        f"{name:9s}  {right.sum()}/{len(right)}  {right.mean():.4f}"
        f"  Wilson 95 %: {interval.low:.4f} to {interval.high:.4f}"
        f"  {seconds * 1e6:.0f} us a picture"
    )


def compare(ours: NDArray[np.bool_], peer: NDArray[np.bool_]) -> None:
    """Print the ratio of the errors, and whether so few pictures can tell the two apart."""
    only_ours, only_peer = int((ours & ~peer).sum()), int((peer & ~ours).sum())
    disagree = only_ours + only_peer
    p_value = binomtest(only_ours, disagree).pvalue if disagree else 1.0
    print(f"errors, ViT / SVC: {(~ours).sum()} / {(~peer).sum()}", end="")
    print(f" = {(~ours).sum() / (~peer).sum():.2f}" if (~peer).any() else "")
    print(f"right alone: ViT {only_ours}, SVC {only_peer}; exact McNemar p = {p_value:.2f}")


def save_confusion(matrix: NDArray[np.int64], path: Path) -> None:
    """Write the confusion matrix as a picture."""
    display = ConfusionMatrixDisplay(matrix).plot(colorbar=False, cmap="Blues")
    display.ax_.set_title("Embedded ViT on the test digits")
    display.figure_.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Grade both on the test part and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="picture of the confusion matrix to write")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    test = load_digits("test")
    classifiers = {"micro ViT": load_vit(), "SVC": fit_svc()}
    answers = {name: classify(test) for name, classify in classifiers.items()}
    right = {name: answer == test.labels for name, answer in answers.items()}
    for name, classify in classifiers.items():
        report(name, right[name], time_per_picture(classify, test))
    compare(right["micro ViT"], right["SVC"])
    matrix = confusion_matrix(test.labels, answers["micro ViT"])
    for true, said in np.argwhere(matrix * (1 - np.eye(10, dtype=int))):
        print(f"ViT read {true} as {said}: {matrix[true, said]}")
    if out:
        save_confusion(matrix, out)


if __name__ == "__main__":
    main()
