"""A real HTTP server on loopback that serves a folder, and fails as it is told to."""

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
"""Answers a request for a file with this content, in its own way."""


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
        """By name of a file what its next requests get, one after the other; the rest are answered well."""

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
    """The connection ends in the middle of what was announced."""
    handler.begin(len(content))
    handler.wfile.write(content[: len(content) // 2])


def truncated(handler: Handler, content: bytes) -> None:
    """What lies on the server is a half of the file, and is announced as such."""
    handler.begin(len(content) // 2)
    handler.wfile.write(content[: len(content) // 2])


def changed(handler: Handler, content: bytes) -> None:
    """As long as it should be, and one bit different."""
    handler.begin(len(content))
    handler.wfile.write(content[:-1] + bytes([content[-1] ^ 1]))


def silent(handler: Handler, content: bytes) -> None:
    """The answer begins, and then nothing comes."""
    handler.begin(len(content))
    handler.wfile.write(content[:10])
    handler.wfile.flush()
    time.sleep(3)


def trickling(handler: Handler, content: bytes) -> None:
    """A byte now and then, for ever."""
    handler.begin(len(content))
    try:
        for byte in content:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            time.sleep(0.02)
    except OSError:
        pass
