"""Counting without Ray: nothing is recorded, and nothing fails. The integration test asks a real Ray what it serves."""

import threading

from pipelines.cluster.metrics import Meter, _metric


def test_without_ray_counting_changes_nothing() -> None:
    threads, metrics = threading.active_count(), _metric.cache_info().currsize
    meter = Meter("encode")
    with meter.busy(), meter.queue() as show:
        show(waiting=3, running=1)
        meter.count_images(10)
        meter.count_rejects({"truncated": 2})
        meter.count_seconds({"read": 0.5})
        meter.count_bytes(read=10, written=0)
    assert (threading.active_count(), _metric.cache_info().currsize) == (threads, metrics)
