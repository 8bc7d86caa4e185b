"""A server that answers as the Hugging Face Hub does, as far as a model is uploaded and downloaded."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn(ThreadingHTTPServer):
    """Repositories in memory; requests without the token are refused, as those of a stranger are."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}

    @property
    def url(self) -> str:
        """The endpoint, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """Run the server while the block runs."""
    with HubStandIn("secret") as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Be quiet."""

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
            return
        path = unquote(self.path.partition("?")[0])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            if name in self.server.repositories:
                self._answer(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
                return
            self.server.repositories[name] = {}
            self.server.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self._answer(200, {"url": f"{self.server.url}/{name}", "id": name, "name": name})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.repositories[name][entry["value"]["path"]] = content
            url = f"{self.server.url}/{name}/commit/{COMMIT}"
            self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        else:
            self._answer(404, {"error": f"no such path: {path}"})

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/revision/")
            name = name.partition("/tree/")[0]
            files = self._files(name)
            if files is None:
                return
            if "/tree/" in path:
                tree = [{"type": "file", "path": p, "size": len(c), "oid": COMMIT} for p, c in files.items()]
                self._answer(200, tree)
                return
            siblings = [{"rfilename": file} for file in files]
            self._answer(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": False})
        elif "/resolve/" in path:
            name, _, rest = path.strip("/").partition("/resolve/")
            files = self._files(name)
            if files is None:
                return
            content = files.get(rest.partition("/")[2])
            if content is None:
                self._refuse("EntryNotFound")
                return
            digest = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        else:
            self._answer(404, {"error": f"no such path: {path}"})

    do_HEAD = do_GET  # noqa: N815

    def _files(self, name: str) -> dict[str, bytes] | None:
        if name not in self.server.repositories:
            self._refuse("RepoNotFound")
            return None
        return self.server.repositories[name]

    def _refuse(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: object) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
