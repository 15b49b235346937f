"""`hhnet agreement`: how far the codes of two models agree on the neighbours of the same samples, as a report."""

from typing import Any

import numpy as np

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.manifest import Artifact, ArtifactInput, fingerprint
from pipelines.artifacts.versions import finished
from pipelines.cluster.progress import stage
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.encode.codes import CodesSet, open_codes
from pipelines.errors import InputError
from pipelines.evaluate.agreement import Matched, agreement_page, match, measure_agreement
from pipelines.evaluate.pair import load_pair
from pipelines.report import plots
from pipelines.storage import Store, canonical_json

HEADLINE = ("overlap", "chance", "k", "correlation", "bits_old", "bits_new")
STEPS = 3
OVERLAP_BINS = 20


def agreement(old: str, new: str, out: str, config: Config) -> dict[str, Any]:
    """Compare the codes `old` and `new` of the same shards into a report at `out`.

    Samples are matched by the sha256 of their tar and their row; those that only one side has are counted and left
    out. The codes may differ in bits. Raises InputError where they share fewer than two samples.
    """
    sides = {"old": open_codes(old), "new": open_codes(new)}
    digests = {role: entry.artifact.digest for role, entry in sides.items()}
    name = fingerprint("report", digests, result_settings(config, "agreement"))
    artifact = finished(Store(out), "report", name)
    if artifact is not None:
        return _answer(artifact, "unchanged")
    with stage("agreement", STEPS, unit="steps") as advance:
        matched = _matched(sides["old"], sides["new"])
        advance(1, note="codes read")
        inputs = tuple(ArtifactInput(role=role, kind="codes", digest=digest) for role, digest in digests.items())
        origin = {role: entry.artifact.uri for role, entry in sides.items()}
        writer = ArtifactWriter(Store(out), "report", name, inputs, origin)
        models = {f"{role} model": entry.model for role, entry in sides.items()}
        artifact = _report(writer, matched, {**digests, **models}, config)
        advance(2)
    return _answer(artifact, "done")


def _matched(old: CodesSet, new: CodesSet) -> Matched:
    if not {shard.sha256 for shard in old.shards} & {shard.sha256 for shard in new.shards}:
        raise InputError(
            f"{old.artifact.uri} and {new.artifact.uri} are codes of different shards: name codes of the same tars"
        )
    matched = match(load_pair(old, [new]), new.bits)
    if len(matched.old) < 2:
        raise InputError(
            f"{old.artifact.uri} and {new.artifact.uri} share {len(matched.old)} samples: at least 2 are needed"
        )
    return matched


def _report(writer: ArtifactWriter, matched: Matched, sources: dict[str, str], config: Config) -> Artifact:
    figures, overlap_Q = measure_agreement(matched, config.agreement)
    counts, _ = np.histogram(overlap_Q, OVERLAP_BINS, (0, 1))
    drawn = {
        "overlap": plots.overlap_histogram((counts / len(overlap_Q)).tolist()),
        "pair_distances": plots.moved_distances(figures.pairs.old, figures.pairs.new),
        "neighbour_distances": plots.moved_distances(figures.neighbours.old, figures.neighbours.new),
    }
    files = {
        "metrics.json": canonical_json(figures.as_json()),
        "report.html": agreement_page(figures, drawn, sources).encode(),
        **{f"{name}.png": data for name, data in drawn.items()},
    }
    parts = [writer.put_part(name, data, figures.queries) for name, data in sorted(files.items())]
    totals = {name: getattr(figures, name) for name in ("queries", "samples", "old_only", "new_only")}
    return writer.commit(parts, totals, {name: getattr(figures, name) for name in HEADLINE})


def _answer(artifact: Artifact, status: str) -> dict[str, Any]:
    manifest = artifact.manifest
    return {
        "verb": "agreement",
        "status": status,
        "uri": artifact.uri,
        "digest": artifact.digest,
        **{name: manifest.meta[name] for name in HEADLINE},
        **manifest.totals,
        "report": f"{artifact.uri}/{manifest.part('report.html').path}",
        "metrics": f"{artifact.uri}/{manifest.part('metrics.json').path}",
    }
