"""Answers that Ray 2.60 gives through private interfaces only. Each function has a test that notices a change."""

from typing import Any


def free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources of each live node by its id, as of about a second ago."""
    from ray._private.state import available_resources_per_node

    return dict(available_resources_per_node())


def draining_nodes() -> dict[str, int]:
    """Return the ids of draining nodes, each with its deadline in ms since 1970, or 0 for none."""
    from ray._private.state import state

    found: dict[str, Any] = state.get_draining_nodes()
    return found
