"""Says what is left of a study: its trainings, the images that they see, and their time at the pace of those done."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.runs import closed_records
from pipelines.artifacts.versions import find_finished
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.shards.shards import open_shards
from pipelines.storage import Store
from pipelines.train.train import plan_training

NAME_DIGEST_CHARS = 16


@dataclass(frozen=True)
class Forecast:
    """The trainings that are left. `images` is None without data, `seconds` before the first training is done."""

    trainings: int
    images: int | None = None
    seconds: float | None = None


def forecast_trainings(configs: Iterable[Config], data: tuple[Artifact, Artifact | None] | None, out: str) -> Forecast:
    """Return what is left of these trainings; `data` are the shards to train and to validate on.

    The pace is that of the trainings done below `out`: those with the same network and input size where there are any.
    It includes the start of Ray and of the workers.
    """
    wanted = list({json.dumps(result_settings(config, "model"), sort_keys=True): config for config in configs}.values())
    if data is None:
        return Forecast(len(wanted))
    total, held_out = open_shards(data[0]).samples, data[1] is not None
    left: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    spent: dict[str, float] = {}
    missing = 0
    for config in wanted:
        network = f"{config.model.backbone} {config.data.image_size}"
        images = config.train.epochs * (total - (0 if held_out else round(config.train.val_share * total)))
        model = _find_model(config, data, out)
        if model is None:
            missing += 1
            left[network] += images
        else:
            seconds = sum(float(record.get("seconds", 0)) for record in closed_records(model.store))
            for name in (network, ""):
                seen[name] += images
                spent[name] = spent.get(name, 0.0) + seconds
    paces = {name: spent[name] / seen[name] for name in spent if seen[name]}
    if left and not paces:
        return Forecast(missing, left.total())
    return Forecast(missing, left.total(), sum(n * paces.get(name, paces.get("", 0.0)) for name, n in left.items()))


def _find_model(config: Config, data: tuple[Artifact, Artifact | None], out: str) -> Artifact | None:
    mark = plan_training(*data, out, config).fingerprint
    return find_finished(Store(f"{Store(out).uri}/model/{mark[:NAME_DIGEST_CHARS]}"), "model", mark)
