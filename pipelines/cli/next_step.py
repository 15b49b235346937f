"""The command that a user would run next, with the places that are known; a word in capitals stands for others."""

import shlex
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from pipelines.artifacts.result import Result
from pipelines.artifacts.words import last_part, short_place
from pipelines.errors import HHNetError
from pipelines.storage import Store

Given: TypeAlias = Mapping[str, Any]
"""The options of the finished verb, by the names of their parameters."""

KEPT_SECTIONS = ("ray.", "store.")
"""Settings that the next verb needs as well: where Ray is and how stores are read."""


def next_step(result: Result, given: Given) -> str:
    """Return the next command as one line, or "" if none follows."""
    find = _NEXT.get(result.verb)
    words = find(result, given) if find else ""
    if not words:
        return ""
    if isinstance(words, str):
        return f"next: {words}"
    return f"next: {shlex.join(['hhnet', *words, *_kept(given)])}"


def _kept(given: Given) -> list[str]:
    """Return the options that say where Ray and the stores are."""
    config = ["--config", str(given["config"])] if given.get("config") else []
    sets = [one for one in given.get("sets") or () if one.strip().startswith(KEPT_SECTIONS)]
    return [*config, *(word for one in sets for word in ("--set", one))]


def _place(uri: str) -> str:
    """Return a URI as the user would type it here."""
    return short_place(Store(uri).uri)


def _beside(uri: str, folder: str, name: str) -> str:
    """Return the place `name` beside the `folder` that holds `uri`, or beside `uri` itself."""
    above = _place(uri).rstrip("/").split("/")[:-1]
    if above and above[-1] == folder:
        above.pop()
    return "/".join([*above, name])


def _is_there(uri: str) -> bool:
    try:
        return Store(uri).size("manifest.json") is not None
    except HHNetError:
        return False


def _after_ingest(result: Any, given: Given) -> list[str]:
    if (result.version or 1) > 1:
        return ["plan", "--shards", _place(result.uri)]
    splits = result.splits or {}
    learnt = next((split["uri"] for name, split in splits.items() if name == "train"), None)
    source = learnt or next((split["uri"] for split in splits.values()), result.uri)
    if not result.classes:  # nothing to learn from: a model that learned elsewhere encodes them
        return ["encode", "--shards", _place(source), "--model", "MODEL", "--out", _beside(result.uri, "", "codes")]
    return ["train", "--shards", _place(source), "--out", _beside(result.uri, "", "model")]


def _after_train(result: Any, given: Given) -> list[str]:
    shards = _place(given["shards"]) if given.get("shards") else "SHARDS"
    out = f"{_beside(result.uri, '', 'codes')}/{last_part(shards) if given.get('shards') else 'NAME'}"
    return ["encode", "--shards", shards, "--model", _place(result.uri), "--out", out]


def _after_encode(result: Any, given: Given) -> list[str] | str:
    if result.status == "dry-run":
        return "the same command without --dry-run"
    codes, index = _place(result.uri), _beside(result.uri, "codes", "index")
    if last_part(codes) == "query":
        found = [_beside(result.uri, "", name) for name in ("train", "database")]
        named = [word for uri in found if _is_there(uri) for word in ("--database", uri)]
        report = _beside(result.uri, "codes", "report")
        return ["evaluate", "--queries", codes, *(named or ["--database", "CODES"]), "--out", report]
    if _is_there(index):
        return ["index", "add", "--index", index, "--codes", codes]
    beside = [_beside(result.uri, "", name) for name in ("train", "database")]
    known = dict.fromkeys([*(uri for uri in beside if _is_there(uri)), codes])
    return ["index", "build", *(word for uri in known for word in ("--codes", uri)), "--out", index]


def _verify_it(result: Any, given: Given) -> list[str]:
    return ["verify", _place(result.uri)]


def _search(index: str) -> list[str]:
    return ["search", "--index", index, "--image", "PHOTO.jpg", "-k", "10", "--html", "found.html"]


def _after_index(result: Any, given: Given) -> list[str] | str:
    if result.status == "planned":
        return "the same command without --dry-run"
    if result.version is None or given.get("publish") is False:
        return ["index", "publish", "--index", _place(result.uri)]
    return _search(_place(given.get("index") or result.uri))


def _after_alias(result: Any, given: Given) -> list[str]:
    return _search(_place(given["alias_"]))


def _after_search(result: Any, given: Given) -> str:
    return f"open {short_place(result.html)} in a browser" if result.html else ""


def _open_report(result: Any, given: Given) -> str:
    report = getattr(result, "report", None)
    if report is None:  # a study that is not whole
        return "the same command without --dry-run" if result.dry_run else "the same command does what is missing"
    return f"open {short_place(report)} in a browser"


def _after_run(result: Any, given: Given) -> list[str]:
    return _search(f"{_place(result.store)}/index")


def _after_gc(result: Any, given: Given) -> list[str] | str:
    if result.dry_run:
        return "the same command without --dry-run" if result.deleted or result.collected else ""
    return _verify_it(result, given)


def _after_status(result: Any, given: Given) -> list[str]:
    return ["status", _place(result.uri), "--watch"] if result.status == "working" else []


_NEXT: Mapping[str, Callable[[Any, Given], list[str] | str]] = {
    "ingest": _after_ingest,
    "train": _after_train,
    "encode": _after_encode,
    "retry-rejects": _verify_it,
    **{f"index {name}": _after_index for name in ("build", "add", "remove", "compact", "publish", "rollback", "info")},
    "alias": _after_alias,
    "search": _after_search,
    "evaluate": _open_report,
    "agreement": _open_report,
    "study": _open_report,
    "run": _after_run,
    "gc": _after_gc,
    "status": _after_status,
    "dedupe": _verify_it,
}
