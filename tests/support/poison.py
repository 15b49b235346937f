"""Pictures that kill or hold the process which decodes them, and only a decode process of an encode."""

from pathlib import Path

KILLS = b"this picture kills its decode process"
HOLDS = b"this picture is decoded for ever"

_HOOK = f"""
import os, signal, sys
if "pipelines.encode.decoder" in sys.orig_argv:
    from pipelines.shards import images
    usual = images.decode_picture
    def decode_picture(data, *more):
        if {KILLS!r} in data:
            os.kill(os.getpid(), signal.SIGKILL)
        while {HOLDS!r} in data:
            signal.pause()
        return usual(data, *more)
    images.decode_picture = decode_picture
"""


def write_hook(folder: Path) -> str:
    """Write the module that makes decode processes fall for these pictures; a folder to put on their PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK)
    return str(folder)
