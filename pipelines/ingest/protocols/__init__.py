"""Protocols of the field: named splits of a data set into training images, queries and database.

    the data set's own files -> checked sizes, labels, counts -> part of each image -> checked counts -> card, leaks

Each data set is one module: a subclass of `Protocol` that reads its files and assigns parts to its images, and its
protocols, which are collected in `PROTOCOLS`.
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
    """Return the protocol of this name. Raises UsageError, with all names, if there is none."""
    if name not in PROTOCOLS:
        raise UsageError(f"protocol {name!r} is unknown: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
