"""Puts `pipelines` and `flows` into a wheel below `hhnet`, where they overwrite nobody's packages of these names."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = "hhnet/_packages"
PATHS = "hhnet-packages.pth"
"""Lets every Python of the environment import both packages, after a user's own of these names.

Its second line imports them at the start of a process that the command line began: Ray puts the user's folder first
into the path of its workers, where a `pipelines` of the user's own would come first.
"""


class PackagesBelow(BuildHookInterface):
    """Adds both packages to a wheel; an editable install imports them from the checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Name the files that the wheel gets beside those of `hhnet`."""
        if version == "editable":
            return
        root = Path(self.root)
        build_data["force_include"] |= {f"infra/{PATHS}": PATHS} | {
            file: f"{PLACE}/{file}"
            for name in ("pipelines", "flows")
            for file in (str(path.relative_to(root)) for path in sorted((root / name).rglob("*")) if path.is_file())
            if "__pycache__" not in file
        }
