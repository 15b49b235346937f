"""Where numba's cache cannot be written, the loops are compiled without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hhnet

SEARCH = """
import numpy as np
from hhnet.search.kernels import hamming_distances
print(hamming_distances(np.zeros((1, 8), np.uint8), np.full((1, 8), 255, np.uint8)))
"""


def test_an_installation_without_a_place_for_the_cache_searches_and_says_so_once(tmp_path: Path) -> None:
    """A package folder and a home in which nothing can be written, also by root."""
    shutil.copytree(Path(hhnet.__file__).parent, tmp_path / "hhnet", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("hhnet", "hhnet/search", "hhnet/metrics"):
        (tmp_path / folder / "__pycache__").touch()
    kept = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    env = {**kept, "PYTHONPATH": str(tmp_path), "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache"}
    done = subprocess.run([sys.executable, "-c", SEARCH], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[[64]]\n"), done.stderr
    assert done.stderr.count("numba can write its cache neither beside hhnet nor below the home") == 1
