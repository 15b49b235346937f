"""Remembers proven tars by their digest, so that the next run need not read them again.

They are remembered below the run's `--out`, outside every artifact: `proven/<id>.json`, each put once.
"""

import json
import uuid
from collections.abc import Collection

from pipelines.errors import DamagedArtifact
from pipelines.storage import Store, canonical_json

PROVEN_FOLDER = "proven"


def remembered_tars(store: Store) -> set[str]:
    """Return the sha256 of all tars that runs with this `--out` proved; raise DamagedArtifact for a broken record."""
    known: set[str] = set()
    for name in store.names(PROVEN_FOLDER):
        try:
            known.update(json.loads(store.read(name))["tars"])
        except (ValueError, KeyError, TypeError):
            raise DamagedArtifact(
                f"{store.uri}/{name} is no list of proven tars: delete it, and they are read again"
            ) from None
    return known


def remember_tars(store: Store, digests: Collection[str]) -> None:
    """Keep the sha256 of tars whose bytes were just read and found right."""
    if digests:
        store.put(f"{PROVEN_FOLDER}/{uuid.uuid4().hex}.json", canonical_json({"tars": sorted(digests)}))
