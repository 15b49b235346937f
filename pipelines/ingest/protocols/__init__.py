"""Protocols of the field: which images of a data set are training images, queries and database, under one name.

    the data set's own files -> checked sizes, labels, counts -> part of each image -> checked counts -> card, leaks

A data set is one module here: a subclass of `Protocol` that reads its files and deals its images, and its protocols,
which stand in `PROTOCOLS`.
"""

from collections.abc import Mapping

from pipelines.errors import UsageError
from pipelines.ingest.protocols.base import Protocol
from pipelines.ingest.protocols.cifar10 import CIFAR10
from pipelines.ingest.protocols.coco import COCO
from pipelines.ingest.protocols.imagenet100 import IMAGENET100
from pipelines.ingest.protocols.nuswide import NUSWIDE

PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in (*CIFAR10, *IMAGENET100, *NUSWIDE, *COCO)}


def find_protocol(name: str) -> Protocol:
    """The protocol of this name; UsageError, with the names that there are, where there is none."""
    if name not in PROTOCOLS:
        raise UsageError(f"protocol {name!r} is unknown: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
