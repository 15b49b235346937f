#!/usr/bin/env bash
# Install what HHNet needs, without its code, into a new virtual environment: dependencies.sh cpu|gpu FOLDER [INDEX]
#
# INDEX is a package index with torch's wheels for CPUs. PyPI's wheels for Linux bring 3.2 GB of CUDA libraries; they
# are taken for gpu, without INDEX, and where INDEX has no wheels of the locked versions.
set -euo pipefail

extra="${1:?usage: dependencies.sh cpu|gpu FOLDER [INDEX]}"
folder="${2:?usage: dependencies.sh cpu|gpu FOLDER [INDEX]}"
index="${3:-}"
case "$extra" in cpu | gpu) ;; *) echo "dependencies: EXTRA is cpu or gpu, not $extra" >&2 && exit 2 ;; esac

python -m venv "$folder"
pip() { "$folder/bin/pip" --disable-pip-version-check --no-cache-dir "$@"; }

if [[ "$extra" == cpu && -n "$index" ]]; then
    pip install --no-deps --index-url "$index" -c requirements.lock torch torchvision ||
        echo "dependencies: $index has no CPU wheels of the locked torch: taking PyPI's, with 3.2 GB of CUDA" >&2
fi

# An empty package of the same pyproject.toml asks for all that the real one does.
empty="$(mktemp -d)"
trap 'rm -rf "$empty"' EXIT
mkdir "$empty/hhnet"
touch "$empty/README.md" "$empty/LICENSE" "$empty/hhnet/__init__.py"
cp -r pyproject.toml infra "$empty"
pip install -c requirements.lock hatchling
pip install -c requirements.lock --no-build-isolation "hhnet[flows,$extra] @ file://$empty"
pip uninstall --yes hhnet
