"""Derives the class of each picture from the paths of a source alone.

CLASS/.../FILE          the first folder, as in torchvision's ImageFolder, or with `parent` the last one
PART/CLASS/.../FILE     the same below the folder of a part, if top folders name the parts of a split
FILE                    no class: unlabelled if no picture has a class folder, else a stray picture
00000/000000000.jpg     img2dataset's output format `files`: unlabelled, with .json and .txt beside it
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.errors import InputError

ClassFrom = Literal["first", "parent"]

SPLIT_NAMES = frozenset(
    {
        *("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"),
        *("query", "queries", "gallery", "database"),
    }
)
"""Names of folders that are more likely the parts of a split than classes, in lower case."""

_NUMBERED = re.compile(r"(\d+)/\1\d*\.[^./]+")
_BESIDE = re.compile(r"(?:.*/)?(\d+)/\1\d*\.(?:json|txt)", re.DOTALL)
_STATS = re.compile(r"(?:.*/)?\d+_stats\.json", re.DOTALL)


@dataclass(frozen=True)
class Layout:
    """Options for reading the folders of a source.

    Unset `class_from` is `first`, and then img2dataset's files are recognised too. `parts`: top folders name parts.
    """

    class_from: ClassFrom | None = None
    parts: bool = False
    labelled: bool = True

    @property
    def depth(self) -> int:
        """Number of folders above a picture with a class, at least."""
        return 1 + self.parts


def may_stand_beside(path: str) -> bool:
    """Tell whether a file has the name of metadata or a caption from img2dataset."""
    return _BESIDE.fullmatch(path) is not None


def is_statistics(path: str) -> bool:
    """Tell whether a file has the name of the counts that img2dataset writes beside the folder of each shard."""
    return _STATS.fullmatch(path) is not None


def is_numbered(paths: Sequence[str], statistics: bool) -> bool:
    """Tell whether all pictures have names from img2dataset: SHARD/SHARD..., where the file's number is longer.

    The length of the numbers is an option of img2dataset, and the only picture of a shard may have the shard's own
    number. Without the `statistics` files beside the folders, numbers of one or two digits are taken for classes.
    """
    found = [_NUMBERED.fullmatch(path) for path in paths]
    return all(match and (statistics or len(match[1]) > 2) for match in found)


def wrapping_folders(common: str, paths: Iterable[str], depth: int, stem: str) -> str:
    """Return the folders that only wrap the pictures, ending with a slash, or "" for none.

    `common` is the folder that holds all files. Its first folders are wrappers as long as the deepest picture keeps
    `depth` folders below them. If there is none by this rule, a first folder with the archive's name, `stem`, is one.
    """
    deepest = max((path.count("/") for path in paths), default=0)
    folders = common.split("/")[:-1]
    wrapped = folders[: max(0, deepest - depth)]
    if len(wrapped) < len(folders) and not wrapped and folders[0] == stem:
        wrapped = folders[:1]
    return "".join(f"{name}/" for name in wrapped)


@dataclass
class PictureClasses:
    """The class of each picture, in the order of their paths, and notes for the user."""

    labels: list[tuple[str, ...] | None]
    """Class names of each picture; None for a stray picture."""
    notes: list[str]


def place_pictures(paths: Sequence[str], layout: Layout, where: str, numbered: bool = False) -> PictureClasses:
    """Derive the class of each picture from its folders; `numbered` pictures have none.

    Raises InputError if top folders should name the parts of a split and no picture lies in PART/CLASS.
    """
    if layout.parts:
        _require_parts(paths, layout, where)
    if numbered:
        note = (
            f"{len(paths):,} pictures in img2dataset's files layout are taken unlabelled, their captions and JSON as "
            "metadata (--class-from first takes the folders as classes)"
        )
        return PictureClasses([()] * len(paths), [note])
    if not layout.labelled:
        return PictureClasses([() if path.count("/") >= layout.parts else None for path in paths], [])
    classed = {path.partition("/")[0] for path in paths if path.count("/") >= 2} if layout.parts else set()
    return _labelled(paths, layout, classed)


def _labelled(paths: Sequence[str], layout: Layout, classed: set[str]) -> PictureClasses:
    skipped = layout.depth - 1
    if not layout.parts and any("/" in path for path in paths):
        classed = {""}
    labels: list[tuple[str, ...] | None] = []
    flat: Counter[str] = Counter()
    differing, example = 0, ("", "", "")
    for path in paths:
        folders = path.split("/")[:-1]
        part = folders[0] if layout.parts and folders else ""
        below = folders[skipped:]
        if below:
            first, parent = below[0], below[-1]
            if first != parent:
                differing, example = differing + 1, example if differing else (path, first, parent)
            labels.append((parent if layout.class_from == "parent" else first,))
        elif part in classed or len(folders) < skipped:
            labels.append(None)
        else:
            flat[part] += 1
            labels.append(())
    notes = [_difference(differing, example, layout)] if differing else []
    notes += _doubtful_classes(sorted({label[0] for label in labels if label}), layout)
    notes += _lone_classes(paths, labels) if layout.parts else []
    for part, count in sorted(flat.items()):
        where = f"{part} has no class folders: its" if part else "there are no class folders: all"
        notes.append(f"{where} {count:,} pictures are taken unlabelled")
    return PictureClasses(labels, notes)


def _doubtful_classes(names: Sequence[str], layout: Layout) -> list[str]:
    """Return a note if all classes have names of parts of a split, or of folders that only number the pictures."""
    if names and not layout.parts and all(name.lower() in SPLIT_NAMES for name in names):
        return [f"the classes are {', '.join(names)}: where these are parts of a split, pass --split folder"]
    first = names[0] if names else ""
    if len(first) > 3 and not first.strip("0") and all(map(re.compile(rf"\d{{{len(first)}}}").fullmatch, names)):
        return [f"the classes are numbers from {first} on: where folders only number the pictures, pass --unlabelled"]
    return []


def _lone_classes(paths: Sequence[str], labels: Sequence[tuple[str, ...] | None]) -> list[str]:
    """Return a note for each part whose only class is in no part with several, as val/images/ beside train/CLASS/."""
    classes: dict[str, set[str]] = {}
    for path, label in zip(paths, labels, strict=True):
        if label:
            classes.setdefault(path.partition("/")[0], set()).update(label)
    usual = {name for names in classes.values() if len(names) > 1 for name in names}
    return [
        f"{part} has one class, {name}, which parts with several do not have: if it is none, ingest {part} by itself "
        "with --unlabelled"
        for part, names in sorted(classes.items())
        for name in names
        if usual and len(names) == 1 and name not in usual
    ]


def _difference(count: int, example: tuple[str, str, str], layout: Layout) -> str:
    path, first, parent = example
    named = f"{path}: {first}, not {parent}"
    rule, other = "first folder", "--class-from parent takes the folder that holds the picture"
    if layout.class_from == "parent":
        named = f"{path}: {parent}, not {first}"
        rule, other = "folder that holds the picture", "without --class-from parent it is the first folder"
    return f"the class is the {rule}; of {count:,} pictures the other rule makes another ({named}); {other}"


def _require_parts(paths: Sequence[str], layout: Layout, where: str) -> None:
    wanted, needed = (2, "SPLIT/CLASS/FILE") if layout.labelled else (1, "SPLIT/FILE")
    if paths and not any(path.count("/") >= wanted for path in paths):
        more = "; --unlabelled takes SPLIT/FILE" if layout.labelled else ""
        raise InputError(f"{where}/{min(paths)} is not in {needed}, as --split folder needs{more}")
