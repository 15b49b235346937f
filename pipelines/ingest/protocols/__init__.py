"""Protocols of the field: which images of a data set are training images, queries and database, under one name.

    the data set's own files -> checked sizes, labels, counts -> part of each image -> checked counts -> card, leaks

A data set is one module here: a subclass of `Protocol` that reads its files and deals its images, and the tuple
`PROTOCOLS` of its protocols. Modules without that tuple are helpers.
"""

import importlib
import pkgutil

from pipelines.errors import UsageError
from pipelines.ingest.protocols.base import Protocol


def find_protocol(name: str) -> Protocol:
    """Return the protocol of this name; UsageError, with the names that there are, where there is none."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    known: dict[str, Protocol] = {one.name: one for module in modules for one in getattr(module, "PROTOCOLS", ())}
    if name not in known:
        raise UsageError(f"protocol {name!r} is unknown: choose one of {', '.join(known)}")
    return known[name]
