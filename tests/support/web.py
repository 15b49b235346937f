"""A web server on loopback whose answers a test writes."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


def body(data: bytes, status: int = 200, kind: str = "image/jpeg", **headers: str) -> Answer:
    """An answer with these bytes."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)

    return answer


def redirect(to: str) -> Answer:
    """An answer that sends the client elsewhere."""
    return body(b"", 302, Location=to)


def endless(request: BaseHTTPRequestHandler) -> None:
    """Bytes as fast as the client takes them, without an end."""
    request.send_response(200)
    request.end_headers()
    while True:
        request.wfile.write(bytes(1 << 16))


def dripping(stop: threading.Event) -> Answer:
    """A byte every twentieth of a second: never silent, never done."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        while not stop.wait(0.05):
            request.wfile.write(b"\xff")
            request.wfile.flush()

    return answer


@contextmanager
def web_server(answers: Mapping[str, Answer]) -> Iterator[str]:
    """Serve these answers by their paths, 404 elsewhere; yield the server's URL without a slash at its end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                answers.get(self.path, body(b"no such page", 404, "text/html"))(self)
            except ConnectionError:  # the client had enough
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
