"""Lists the proof of each kind of artifact: its contents beyond their digests, and its relation to its inputs.

A proof adds problems to `Findings` instead of raising, so that one run names all of them. It reads parts through
`Artifact.read`, which checks their digests before anything is parsed.
"""

from collections.abc import Callable, Mapping

from pipelines.verify.codes import prove_codes
from pipelines.verify.duplicates import prove_duplicates
from pipelines.verify.findings import Findings
from pipelines.verify.index import prove_index
from pipelines.verify.model import prove_checkpoint, prove_model
from pipelines.verify.report import prove_alias, prove_report
from pipelines.verify.study import prove_study

PROOFS: Mapping[str, Callable[[Findings], None]] = {
    "codes": prove_codes,
    "index": prove_index,
    "model": prove_model,
    "checkpoint": prove_checkpoint,
    "report": prove_report,
    "duplicates": prove_duplicates,
    "alias": prove_alias,
    "study": prove_study,
}
"""The proof of each kind. `shards` is not here, since its tars are digested and read in one pass."""
