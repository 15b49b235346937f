"""Cross-entropy against its formula."""

from typing import Any

from tests.support.losses import Array, check_formula, mean, softmax_entropy

SENSELESS: dict[str, tuple[float, ...]] = {}
SOFT: dict[str, float] = {}


def cross_entropy(loss: Any, z: Array, y: Array) -> float:
    weights, biases = (tensor.detach().numpy() for tensor in (loss.classifier.weight, loss.classifier.bias))
    logits = [[float(w @ row + b) for w, b in zip(weights, biases, strict=True)] for row in z]
    return mean([softmax_entropy(logits[i], y[i]) for i in range(len(z)) if y[i].any()])


def test_formula() -> None:
    check_formula("ce", cross_entropy)
