"""A stand-in on loopback for Hugging Face: the few endpoints with which its own library reads a data set.

It is no server of theirs, since there is none to install; it answers as theirs is documented to.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPOSITORY = "owner/name"
REVISION = "main"
COMMIT = "0" * 40


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    asked: list[str]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        about, tree = f"/api/datasets/{REPOSITORY}", f"/api/datasets/{REPOSITORY}/tree/{REVISION}"
        if path in (about, f"{about}/revision/{REVISION}"):
            self._json({"_id": "1", "id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        elif path == tree or path.startswith(f"{tree}/"):
            self._list(path[len(tree) :].strip("/"), "recursive=True" in self.path)
        elif path.startswith(resolved := f"/datasets/{REPOSITORY}/resolve/{REVISION}/"):
            self._send(path.removeprefix(resolved))
        else:
            self._absent("RepoNotFound")

    def do_HEAD(self) -> None:
        self._absent("EntryNotFound")

    def _list(self, prefix: str, recursive: bool) -> None:
        top = self.folder / prefix
        if not top.is_dir():
            self._absent("EntryNotFound")
            return
        found = sorted(top.rglob("*") if recursive else top.iterdir())
        self._json([self._facts(path) for path in found])

    def _facts(self, path: Path) -> dict[str, object]:
        kind = "directory" if path.is_dir() else "file"
        size = 0 if path.is_dir() else path.stat().st_size
        return {"type": kind, "oid": COMMIT, "size": size, "path": str(path.relative_to(self.folder))}

    def _send(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            self._absent("EntryNotFound")
            return
        data = path.read_bytes()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self._end(part, "application/octet-stream")

    def _json(self, value: object) -> None:
        self.send_response(200)
        self._end(json.dumps(value).encode(), "application/json")

    def _absent(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self._end(b"{}", "application/json")

    def _end(self, body: bytes, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the data set REPOSITORY; yield the endpoint and the paths that are asked for."""
    asked: list[str] = []
    handler = type("_Served", (_Handler,), {"folder": folder, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()
