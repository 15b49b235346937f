"""Protocols of the field: named splits of a data set into training images, queries and database.

    the data set's own files -> checked sizes, labels, counts -> part of each image -> checked counts -> card, leaks

Each data set is one module: a subclass of `Protocol` that reads its files and assigns parts to its images, and the
tuple `PROTOCOLS` of its protocols. Modules without that tuple are helpers.
"""

import importlib
import pkgutil

from pipelines.errors import UsageError
from pipelines.ingest.protocols.base import Protocol


def find_protocol(name: str) -> Protocol:
    """Return the protocol of this name. Raises UsageError, with all names, if there is none."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    known: dict[str, Protocol] = {one.name: one for module in modules for one in getattr(module, "PROTOCOLS", ())}
    if name not in known:
        raise UsageError(f"protocol {name!r} is unknown: choose one of {', '.join(known)}")
    return known[name]
