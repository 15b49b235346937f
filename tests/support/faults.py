"""A proxy in front of an S3 server that loses, cuts and falsifies what passes, as a network and a busy store do.

with FaultProxy(server.endpoint) as proxy, server.environment(AWS_ENDPOINT_URL_S3=proxy.endpoint):
    proxy.choose = lambda request: Fault.LOST if request.operation == "PUT" else None

Each fault is one of three kinds: the request is lost before the store sees it, its answer is lost after the store
carried it out, or the answer is damaged on the way.
"""

import http.client
import random
import select
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DEAF_S = 0.5
HOP_BY_HOP = {"connection", "transfer-encoding", "expect", "keep-alive"}


class Fault(StrEnum):
    """What happens to one request."""

    ERROR = "500, not carried out"
    SLOW_DOWN = "503, not carried out"
    CONFLICT = "409, not carried out"
    FALSE_EXISTS = "412, not carried out"
    DROPPED = "connection reset, not carried out"
    SILENCE = "no answer, not carried out"
    DEAF = "connection reset, not carried out, and for half a second no other is accepted"
    LOST = "carried out, answered 500"
    LOST_RESET = "carried out, connection reset"
    LOST_SILENCE = "carried out, no answer"
    CUT = "connection reset in the middle of the answer's body"
    SHORT = "half of the answer's body, with a Content-Length that agrees"
    WRONG = "one bit of the answer's body flipped"
    SENT_WRONG = "one bit of the request's body flipped"


@dataclass(frozen=True)
class Refusal:
    """Any answer of S3 that is an error; the request is not carried out."""

    status: int
    code: str

    @property
    def name(self) -> str:
        return f"{self.status} {self.code}"


Harm = Fault | Refusal
REFUSALS: Mapping[Fault, Refusal] = {
    Fault.ERROR: Refusal(500, "InternalError"),
    Fault.LOST: Refusal(500, "InternalError"),
    Fault.SLOW_DOWN: Refusal(503, "SlowDown"),
    Fault.CONFLICT: Refusal(409, "ConditionalRequestConflict"),
    Fault.FALSE_EXISTS: Refusal(412, "PreconditionFailed"),
}
UNHEARD = {Fault.DROPPED, Fault.SILENCE, Fault.DEAF}
AFTERWARDS = {Fault.LOST, Fault.LOST_RESET, Fault.LOST_SILENCE}
IN_THE_BODY = {Fault.CUT, Fault.SHORT, Fault.WRONG}


@dataclass(frozen=True)
class Request:
    """A request as the proxy sees it; `operation` is GET, HEAD, PUT, DELETE, LIST, or a step of a multipart upload."""

    operation: str
    key: str
    number: int


class FaultProxy:
    """Passes requests on to `upstream`, and does to each what `choose` says. Counts what it saw and did.

    With a `certificate`, a file that holds one and its key, clients connect by https.
    """

    def __init__(self, upstream: str, certificate: Path | None = None) -> None:
        self.upstream = urlsplit(upstream)
        self.choose: Callable[[Request], Harm | None] = lambda request: None
        self.seen: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.random = random.Random(0)
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def reset(self) -> None:
        """Pass everything on, and count from zero."""
        with self._lock:
            self.choose = lambda request: None
            self.seen.clear()
            self.done.clear()

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Accept no connection: with the queue of those not yet accepted full, the kernel drops what knocks."""
        with self._server.accepting, ExitStack() as queue:
            while True:
                filler = queue.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(self._server.server_address)
                if not select.select([], [filler], [], 0.05)[1]:
                    break
            yield

    def judge(self, operation: str, key: str) -> Harm | None:
        """Count a request and choose its fault."""
        with self._lock:
            self.seen[operation] += 1
            fault = self.choose(Request(operation, key, self.seen[operation]))
            if fault is not None:
                self.done[fault.name] += 1
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: FaultProxy

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.accepting = threading.Lock()

    def get_request(self) -> tuple[Any, Any]:
        """The next connection, unless none is to be accepted."""
        with self.accepting:
            return super().get_request()

    def shutdown_request(self, request: Any) -> None:
        """Close at once: a connection that is reset must not be ended politely first."""
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that a client or a fault cut short are the point."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        upstream = self.server.proxy.upstream
        self.store = http.client.HTTPConnection(str(upstream.hostname), upstream.port, timeout=60)

    def finish(self) -> None:
        self.store.close()
        with suppress(OSError):
            super().finish()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def handle_request(self) -> None:
        body = self._body()
        operation, key = _described(self.command, self.path)
        fault = self.server.proxy.judge(operation, key)
        if isinstance(fault, Refusal) or fault in REFUSALS.keys() - AFTERWARDS | UNHEARD:
            self._refuse(fault)
            return
        if fault is Fault.SENT_WRONG and body:
            body = self._flipped(body)
        status, headers, content = self._pass_on(body)
        if fault in AFTERWARDS:
            self._refuse(fault)
            return
        if fault in IN_THE_BODY and status < 300 and len(content) > 1:
            self._answer(status, headers, self._damaged(fault, content), cut=fault is Fault.CUT)
            return
        self._answer(status, headers, content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815 - as http.server has them

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        self.store.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in HOP_BY_HOP | {"content-length"}:
                self.store.putheader(name, value)
        if body or self.command in ("PUT", "POST"):
            self.store.putheader("Content-Length", str(len(body)))
        self.store.endheaders(body)
        answer = self.store.getresponse()
        return answer.status, answer.getheaders(), answer.read()

    def _damaged(self, fault: Fault, content: bytes) -> bytes:
        if fault is Fault.SHORT:
            return content[: len(content) // 2]
        return self._flipped(content) if fault is Fault.WRONG else content

    def _flipped(self, content: bytes) -> bytes:
        place = self.server.proxy.random.randrange(len(content) * 8)
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        return bytes(changed)

    def _refuse(self, fault: Harm) -> None:
        if fault in (Fault.SILENCE, Fault.LOST_SILENCE):
            with suppress(OSError):
                self.connection.settimeout(60)
                self.connection.recv(1)
            self.close_connection = True
        elif refusal := fault if isinstance(fault, Refusal) else REFUSALS.get(fault):
            error = f"<Error><Code>{refusal.code}</Code><Message>injected</Message></Error>".encode()
            content = b"" if self.command == "HEAD" else error
            self._answer(refusal.status, [("Content-Type", "application/xml")], content)
        else:
            self._reset()
        if fault is Fault.DEAF:
            with self.server.proxy.deaf():
                time.sleep(DEAF_S)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(content))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in HOP_BY_HOP | {"content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def _described(method: str, path: str) -> tuple[str, str]:
    """The operation and the key (or prefix) of an S3 request in path style."""
    parts = urlsplit(path)
    query = parse_qs(parts.query, keep_blank_values=True)
    key = unquote(parts.path).partition("/")[2].partition("/")[2]
    if not key:
        return ("UPLOADS" if "uploads" in query else "LIST"), query.get("prefix", [""])[0]
    if "uploads" in query:
        return "CREATE", key
    if "uploadId" in query:
        return {"PUT": "PART", "POST": "COMPLETE", "DELETE": "ABORT"}.get(method, method), key
    return method, key
