"""`hhnet VERB` and `python -m hhnet VERB`: the command line, also of an installed wheel.

A wheel keeps the packages of the verbs in `hhnet/_packages`, so that they overwrite nobody's `pipelines` or `flows`.
"""

import os
import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """Run the command line with the packages that belong to this library, in this process and those that it starts."""
    packages = Path(__file__).with_name("_packages")
    if packages.is_dir():
        sys.path.insert(0, str(packages))
        before = os.environ.get("PYTHONPATH")
        os.environ["HHNET_PACKAGES"] = str(packages)  # read by the path file of the wheel
        os.environ["PYTHONPATH"] = f"{packages}{os.pathsep}{before}" if before else str(packages)
    import_module("pipelines.__main__").run_command_line()


if __name__ == "__main__":
    main()
