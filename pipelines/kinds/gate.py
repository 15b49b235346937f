"""What an index must show before it is published, and the recall that its card reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hhnet import hamming_knn
from pipelines.artifacts import FORMAT, Artifact, ArtifactWriter, Manifest, Part, open_artifact
from pipelines.codes import code_array, read_codes
from pipelines.errors import WorkFailed
from pipelines.kinds import Codes, Ids, Neighbours
from pipelines.kinds.artifact import IndexReader, index_id, merge
from pipelines.kinds.parts import PartTask, codes_of, sample_rows
from pipelines.storage import scratch_folder

PROBES = 100
RECALL_AT = 10


def _probes(tasks: Sequence[PartTask], seed: int) -> tuple[Codes, Ids]:
    """Seeded codes, read from the codes artifacts, and the ids that the index must give them."""
    codes, ids = [], []
    for task, places in sample_rows(tasks, PROBES, seed):
        table = read_codes(open_artifact(task.codes_uri, "codes"), task.part, task.bits)
        codes.append(code_array(table["code"])[places])
        ids.append(index_id(task.ordinal, 0) + table["row"].to_numpy().astype(np.int64)[places])
    return np.concatenate(codes), np.concatenate(ids)


def measured_recall(
    writer: ArtifactWriter,
    parts: list[Part],
    totals: Mapping[str, int],
    meta: Mapping[str, Any],
    tasks: Sequence[PartTask],
    seed: int,
) -> dict[str, float]:
    """Recall of the parts against an exact scan of the codes, over a seeded sample of them."""
    probes, _ = _probes(tasks, seed)
    exact: Neighbours = np.empty((len(probes), 0), np.int32), np.empty((len(probes), 0), np.int64)
    for task in tasks:
        if task.part.rows:
            distances, rows = hamming_knn(probes, codes_of(task), RECALL_AT)
            exact = merge(exact, (distances, index_id(task.ordinal, 0) + rows), RECALL_AT)
    with scratch_folder() as folder:
        found, _ = IndexReader(_draft(writer, parts, totals, meta), folder).search(probes, RECALL_AT)
    return {
        "recall": round(tie_aware_recall(found, exact[0]), 4),
        "self_recall": round(float((found[:, 0] == 0).mean()), 4),
    }


def _draft(
    writer: ArtifactWriter, parts: Sequence[Part], totals: Mapping[str, int], meta: Mapping[str, Any]
) -> Artifact:
    """The artifact as it will be, without the card: its recall is measured before it can be committed."""
    manifest = Manifest(
        format=FORMAT,
        kind="index",
        fingerprint=writer.fingerprint,
        inputs=writer.inputs,
        parts=tuple(parts),
        receipts=(),
        totals=dict(totals),
        meta=dict(meta),
        digest="",
    )
    return Artifact(writer.store, manifest)


def tie_aware_recall(found: Any, exact: Any) -> float:
    """Share of the k places whose neighbour is as near as the exact k-th, whichever of several equals it is."""
    return float((found <= exact[:, -1:]).mean())


def check_gate(artifact: Artifact, tasks: Sequence[PartTask], seed: int) -> None:
    """WorkFailed unless every part opens with all its codes and a seeded sample of codes finds itself at distance 0."""
    probes, ids = _probes(tasks, seed)
    with scratch_folder() as folder:
        reader = IndexReader(artifact, folder)
        opened = sum(reader.open_part(shard).count for shard in reader.filled())
        expected = sum(task.part.rows for task in tasks)
        if opened != expected:
            raise WorkFailed(f"{artifact.uri}: the parts hold {opened} codes of {expected}; not published")
        distances, found = reader.search(probes, RECALL_AT)
    # A code that more than RECALL_AT samples share may be represented by others of them.
    itself = (found == ids[:, None]).any(1) | (distances == 0).all(1)
    lost = int((~itself | (distances[:, 0] != 0)).sum())
    if lost:
        raise WorkFailed(f"{artifact.uri}: {lost} of {len(ids)} sampled codes do not find themselves; not published")
