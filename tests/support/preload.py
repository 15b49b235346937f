"""Everything that a verb imports when it comes to it, for a process that others are forked from.

Most of what a verb would wait for in a test is imports, numba's first compilation, and the garbage collector, which
goes through all that was imported.
"""

import gc

import matplotlib.pyplot as plt
import numba
import pandas as pd
import scipy.special

import pipelines.cli.main
import pipelines.dedupe.dedupe
import pipelines.dedupe.pairs
import pipelines.encode.encoder
import pipelines.evaluate.evaluate
import pipelines.index.planner
import pipelines.ingest.ingest
import pipelines.storage.s3
import tests.support.drivers

__all__ = ["pd", "pipelines", "plt", "scipy", "tests"]

numba.njit(lambda number: number + 1)(1)
gc.freeze()
