"""Says in two sentences what to do next, from the figures of a report."""

from collections.abc import Iterator, Sequence

from pipelines.artifacts.facts import EpochFigures, ModelCard
from pipelines.artifacts.words import list_first
from pipelines.evaluate.figures import ReportFigures

CLASSES_NAMED = 3
MIN_CONFUSION = 0.15
"""Share of the nearest neighbours from which a wrong class is worth a sentence."""
FEW_DISTINCT = 0.1
"""Share of distinct codes in the database below which ties decide much of the order."""
MIN_RISE = 0.01
"""Rise of the validation mAP in the last third of a training from which more epochs are advised."""


def advise(figures: ReportFigures, card: ModelCard | None) -> list[str]:
    """Return two sentences: the two most pressing findings, or else what good codes are good for."""
    found = [*_findings(figures, card), *_when_good(figures)]
    return found[:2]


def _findings(figures: ReportFigures, card: ModelCard | None) -> Iterator[str]:
    """Yield what should be mended, the most pressing first."""
    weak = [entry.name for entry in figures.classes if entry.at_chance]
    measured = [entry for entry in figures.classes if entry.map is not None]
    if measured and len(weak) == len(measured):
        yield "No class is found better than by chance: check labels and model first, before you build an index."
    elif weak:
        verb, pictures = ("is", "its pictures") if len(weak) == 1 else ("are", "their pictures")
        problem = f"{list_first(weak, CLASSES_NAMED)} {verb} found hardly better than by chance"
        yield f"{problem}: look at {pictures} for wrong labels, or add training images."
    history = card.history if card else ()
    if _still_rising(history):
        longer = f"train for longer, to another --out, for example with --set train.epochs={2 * len(history)}"
        yield f"The validation mAP still rose at the end of the training: {longer}."
    worst = next(iter(figures.confusion.most), None)
    if worst is not None and worst.share >= MIN_CONFUSION:
        problem = f"{worst.share:.0%} of the nearest neighbours of {worst.query} are {worst.neighbour}"
        yield f"{problem}: add training images of both, or make them one class if you need not tell them apart."
    if figures.distinct < FEW_DISTINCT * figures.database and figures.reranked is None:
        problem = f"Only {figures.distinct:,} of {figures.database:,} codes differ, so ties decide much of the order"
        yield f"{problem}: use more bits (model.bits), or encode real codes and search with --rerank."


def _when_good(figures: ReportFigures) -> Iterator[str]:
    measured = [entry for entry in figures.classes if entry.map is not None]
    lowest = min(measured, key=lambda entry: (entry.map, entry.name), default=None)
    if lowest is not None:
        yield f"The weakest class is {lowest.name} with mAP {lowest.map:.3f}: more training images of it help most."
    yield "To use these codes, build an index of the database (hhnet index build) and search in it (hhnet search)."


def _still_rising(history: Sequence[EpochFigures]) -> bool:
    """Tell whether the last third of the validated epochs beats all before it."""
    maps = [entry.map for entry in history if entry.map is not None]
    last = max(1, len(maps) // 3)
    return len(maps) > last and max(maps[-last:]) - max(maps[:-last]) >= MIN_RISE
