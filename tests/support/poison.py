"""Pictures that kill or hold the process which decodes them, and only a decoder of an encode."""

from pathlib import Path

KILLS = b"this picture kills its decode process"
HOLDS = b"this picture is decoded for ever"

_HOOK = f"""
import os, signal, sys
if any(word.endswith(PROGRAMS) for word in sys.orig_argv):
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


def write_hook(folder: Path, *more: str) -> str:
    """Write the module that makes decode processes fall for these pictures; a folder to put on their PYTHONPATH.

    `more` names further programs, such as default_worker.py, in which Ray runs decoders.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(f"PROGRAMS = {('pipelines.encode.decoder', *more)}\n{_HOOK}")
    return str(folder)
