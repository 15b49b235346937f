"""A plug-in for the time of a test: one module file, and nothing else that has to know of it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def plugged_in(package: ModuleType, folder: Path, name: str, source: str) -> Iterator[None]:
    """Write `source` as module `name` into `folder`, which `package` looks through for as long as this lasts."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    package.__path__.append(str(folder))
    try:
        yield
    finally:
        package.__path__.remove(str(folder))
        sys.modules.pop(f"{package.__name__}.{name}", None)
