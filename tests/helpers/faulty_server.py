"""HTTP server on loopback that serves a folder, with injected faults."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[["Handler", bytes], None]
"""Answers a request for a file; gets the content of the file."""


class Handler(SimpleHTTPRequestHandler):
    server: FaultyServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        faults = self.server.faults.get(name, [])
        path = Path(self.translate_path(self.path))
        if faults and path.is_file():
            faults.pop(0)(self, path.read_bytes())
            self.close_connection = True
            return
        super().do_GET()

    def begin(self, num_bytes: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(num_bytes))
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, list[Fault]] = {}
        """Faults of the next requests for each file name, in order. Later requests succeed."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    with FaultyServer(folder) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def unavailable(handler: Handler, content: bytes) -> None:
    handler.send_error(503)


def forbidden(handler: Handler, content: bytes) -> None:
    handler.send_error(403)


def cut(handler: Handler, content: bytes) -> None:
    """Close the connection after half of the announced bytes."""
    handler.begin(len(content))
    handler.wfile.write(content[: len(content) // 2])


def truncated(handler: Handler, content: bytes) -> None:
    """Announce and send half of the file, as if the file on the server were truncated."""
    handler.begin(len(content) // 2)
    handler.wfile.write(content[: len(content) // 2])


def changed(handler: Handler, content: bytes) -> None:
    """Send all bytes, with one bit flipped."""
    handler.begin(len(content))
    handler.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))


def silent(handler: Handler, content: bytes) -> None:
    """Begin the response and then stall."""
    handler.begin(len(content))
    handler.wfile.write(content[:10])
    handler.wfile.flush()
    time.sleep(3)


def trickling(handler: Handler, content: bytes) -> None:
    """Send one byte every 20 ms."""
    handler.begin(len(content))
    try:
        for byte in content:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.02)
    except OSError:
        pass
