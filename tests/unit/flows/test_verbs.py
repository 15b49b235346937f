"""What is left unsent when a run ends: a server that is slow still gets it, one that is gone costs no minutes."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SEND = """
import time, uuid, flows.verbs
from prefect.logging.handlers import APILogWorker
said = {"name": "x", "level": 20, "flow_run_id": str(uuid.uuid4()), "timestamp": "2026-01-01T00:00:00Z"}
for number in range(3):
    APILogWorker.instance().send({**said, "message": f"line {number}"})
    time.sleep(1)  # the first is on its way, the others wait behind it
flows.verbs._report_all()
"""


class Slow(BaseHTTPRequestHandler):
    """A server of Prefect that takes three seconds over log lines, and keeps them."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/logs/":
            time.sleep(3)
            self.server.lines += [line["message"] for line in json.loads(body)]  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"true")

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("there", [True, False])
def test_a_slow_server_gets_every_line_and_one_that_is_gone_is_not_waited_for(there: bool, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.lines = []  # type: ignore[attr-defined]
    if there:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        **{"HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path), "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false"},
        **{
            "PREFECT_API_URL": f"http://127.0.0.1:{server.server_port}/api",
            "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.1",
        },
    }
    done = subprocess.run([sys.executable, "-c", SEND], env=env, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr.decode()
    if there:
        server.shutdown()
        server.server_close()
    assert server.lines == [f"line {number}" for number in range(3 if there else 0)]  # type: ignore[attr-defined]
