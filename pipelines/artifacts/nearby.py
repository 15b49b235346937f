"""Finds the artifacts below a folder, and says what lies at or near a place where none was committed."""

import difflib
import os
from contextlib import suppress
from itertools import islice
from pathlib import Path

from pipelines.artifacts.runs import read_runs
from pipelines.artifacts.words import list_first
from pipelines.errors import HHNetError
from pipelines.storage import Store, map_in_order

NAMES_SHOWN = 5
"""Number of artifacts below a place that a message names."""
FOLDERS_LOOKED_AT = 50
"""Number of folders at each level below a place in which artifacts are looked for."""
FILES_LOOKED_AT = 2000
"""Number of files below a place among which pictures are looked for."""

OWN_FOLDERS = frozenset(
    ("parts", "rejects", "receipts", "manifests", "runs", "proofs", "failures", "checkpoints", "versions", "origins")
)
"""Folders of an artifact itself, in which no other one is looked for."""

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")


def is_root(store: Store) -> bool:
    """Tell whether a verb has begun an artifact here."""
    return store.size("identity.json") is not None or store.size("manifest.json") is not None


def list_roots(store: Store, most: int | None = None, levels: int = 2) -> list[str]:
    """Return the places, up to `levels` folders below `store`, where artifacts were begun; look into `most` of each."""
    folders = [name for name in store.folders() if name not in OWN_FOLDERS][:most]
    checked = map_in_order(lambda name: is_root(store.child(name)), folders)
    found: list[str] = []
    for name, there in zip(folders, checked, strict=True):
        below = list_roots(store.child(name), most, levels - 1) if levels > 1 and not there else []
        found += [name] if there else [f"{name}/{one}" for one in below]
    return found


def explain_absence(store: Store) -> str:
    """Return why `store` may hold no committed artifact, and what to do, for the end of a message."""
    with suppress(HHNetError, OSError):
        if store.size("identity.json") is not None:
            if any(run.state() == "working" for run in read_runs(store)):
                return f"it is being made now: `hhnet status {store.uri}` shows how far"
            return "it was begun and not finished: run the verb that makes it again"
        if below := list_roots(store, FOLDERS_LOOKED_AT):
            named = list_first(below, NAMES_SHOWN)
            example = "train" if "train" in below else below[0]
            return f"below it are {named}: name one of them, as in {store.uri}/{example}"
        root = Path(store.root)
        if store.is_local and _holds_pictures(root):
            return f"these are pictures: `hhnet ingest {store.uri} --out SHARDS` makes shards of them"
        if store.is_local and not root.exists() and (near := _like_path(root)):
            return f"nothing is there: did you mean {near}?"
        if store.is_local and root.is_file():
            return "it is a file: name the folder of the artifact"
    return "finish the verb that makes it, or name another"


def _holds_pictures(root: Path) -> bool:
    files = (name for _, _, names in os.walk(root) for name in names)
    return any(name.lower().endswith(_PICTURES) for name in islice(files, FILES_LOOKED_AT))


def _like_path(path: Path) -> str | None:
    """Return an existing path that is like this one, by the first of its folders that does not exist."""
    missing = next(one for one in [*reversed(path.parents), path] if not one.exists())
    names = [one.name for one in missing.parent.iterdir() if one.is_dir()]
    for name in difflib.get_close_matches(missing.name, names, n=1):
        whole = missing.parent / name / path.relative_to(missing)
        return str(whole if whole.exists() else missing.parent / name)
    return None
