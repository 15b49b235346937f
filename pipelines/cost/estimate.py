"""`hhnet plan --cost`: prints what a corpus and each of its nights will take, before anything is made."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines.artifacts.result import Result
from pipelines.config.settings import Config
from pipelines.cost.model import GB, Model, Planned, StepCost, Work, cost_of
from pipelines.cost.records import read_constants
from pipelines.cost.requests import Requests


@dataclass(frozen=True, kw_only=True)
class CostResult(Result):
    """The predicted cost of each step; `constants` are those that it was computed with, `measured` those from records.

    `total` is the sum of ingest, encode and index; `night` comes on top each night.
    """

    HIDDEN = ("uri", "digest", "constants", "steps")

    verb: str = "plan"
    status: str = "estimated"
    uri: str = ""
    digest: str | None = None
    images: int
    tars: int
    parts: int
    night_images: int
    machines: str
    steps: list[dict[str, Any]]
    stored_bytes: int
    usd_a_month: float
    """Price of keeping what is stored."""
    measured: list[str]
    constants: dict[str, float]

    def tables(self) -> Iterable[Sequence[Mapping[str, Any]]]:
        """Return one table: a row for each figure, a column for each step."""
        columns = {one["step"]: StepCost(**one).words() for one in self.steps}
        names = next(iter(columns.values()))
        return [[{"figure": name, **{step: words[name] for step, words in columns.items()}} for name in names]]

    def fact(self, name: str, value: Any) -> list[str]:
        """Return the lines that show a field; without run records it says so."""
        if name == "measured" and not value:
            return ["nothing: the constants are defaults, --from URI takes those of your artifacts"]
        return super().fact(name, value)


def estimate(
    planned: Planned, config: Config, sources: Sequence[str] = (), image_bytes: float | None = None
) -> CostResult:
    """Predict the cost of these images; `sources` are artifacts whose records give the constants.

    Raises InputError for a source that is no shards, model, codes or index.
    """
    constants, measured = read_constants(sources)
    if image_bytes is not None:
        constants = replace(constants, image_bytes=image_bytes)
        measured = [name for name in measured if name != "image_bytes"]
    model = Model(constants, planned)
    makes = {"ingest": model.ingest, "encode": model.encode, "index": model.build}
    works = {name: make(planned.images) for name, make in makes.items()}
    works["total"] = sum(works.values(), Work(requests=Requests()))
    works["night"] = model.night()
    stored = model.stored()
    nodes = f"{planned.nodes} {'node' if planned.nodes == 1 else 'nodes'}"
    return CostResult(
        images=planned.images,
        tars=planned.tars(planned.images),
        parts=planned.parts(planned.images),
        night_images=planned.night,
        machines=f"{nodes} with {planned.gpus} GPUs and {planned.cpus} CPUs",
        steps=[asdict(cost_of(step, work, config.cost)) for step, work in works.items()],
        stored_bytes=round(stored),
        usd_a_month=round(stored / GB * config.cost.gb_month, 2),
        measured=measured,
        constants=asdict(constants),
    )
