"""The learning curve of a model: loss and validation mAP by epoch, as a table and as a picture."""

import csv
import io
from collections.abc import Sequence

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import EpochFigures
from pipelines.artifacts.manifest import Part

CURVE_TABLE, CURVE_PICTURE = "learning_curve.csv", "learning_curve.png"
"""Names of the two parts of a model."""


def put_curve(writer: ArtifactWriter, history: Sequence[EpochFigures]) -> list[Part]:
    """Put the learning curve as two parts; equal figures give equal bytes."""
    from pipelines.report.plots import learning_curve  # imports matplotlib

    epochs, loss, validated = zip(*((entry.epoch, entry.loss, entry.map) for entry in history), strict=True)
    return [
        writer.put_part(CURVE_TABLE, curve_table(history), rows=len(history)),
        writer.put_part(CURVE_PICTURE, learning_curve(epochs, loss, validated), rows=1),
    ]


def curve_table(history: Sequence[EpochFigures]) -> bytes:
    """Return the figures of each epoch as CSV; the mAP is empty where an epoch was not validated."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("epoch", "step", "loss", "map"))
    rows.writerows((entry.epoch, entry.step, entry.loss, entry.map) for entry in history)
    return text.getvalue().encode()
