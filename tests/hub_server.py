"""A hub on loopback: the two endpoints that a fetch asks, listing and content, with ranges and with faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it serves, what it was asked, and how it misbehaves."""

    repos: dict[str, dict[str, bytes]]
    url: str = ""
    refuse: tuple[int, str] | None = None
    """Status and X-Error-Code with which every listing is refused."""
    cut_once_after: int | None = None
    """The next content that is longer is broken off after so many bytes; then the hub behaves."""
    damage: bool = False
    ignore_ranges: bool = False
    page: bytes | None = None
    """In place of a listing's JSON."""
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range of each request for content; path alone of each listing."""

    def fetched(self) -> list[str]:
        return [path.rpartition(f"/{COMMIT}/")[2] for path, _ in self.requests if "/resolve/" in path]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _entry(name: str, content: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob}
    if name.endswith((".safetensors", ".gguf", ".bin")):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
    return entry


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def end_headers(self) -> None:
            self.send_header("Connection", "close")  # when the server ends, no connection outlives it
            super().end_headers()

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((path, self.headers.get("Range")))
            if listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.*)?", path):
                self.listing(listing[1])
            elif content := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
                self.content(hub.repos[content[1]][content[2]])
            else:
                self.answer(404, b"")

        def listing(self, repo: str) -> None:
            if hub.refuse is not None:
                status, code = hub.refuse
                self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
            elif hub.page is not None:
                self.answer(200, hub.page)
            elif repo not in hub.repos:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            else:
                files = [_entry(name, content) for name, content in hub.repos[repo].items()]
                self.answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode())

        def content(self, whole: bytes) -> None:
            asked = None if hub.ignore_ranges else self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            body = bytes(len(whole)) if hub.damage else whole[start:]
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", '"x"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            cut = hub.cut_once_after
            if cut is None or cut >= len(body):
                self.wfile.write(body)
                return
            hub.cut_once_after = None
            self.wfile.write(body[:cut])
            self.close_connection = True

    return Handler
