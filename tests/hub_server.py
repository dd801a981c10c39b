"""A loopback stand-in for the Hugging Face hub: the endpoints its client uses, and the ways in which a hub fails."""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/[^/]+/(?P<file>.+)")
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?P<rest>/.*)?")

# in a client's process: `asked` holds ["METHOD path", its timeouts in seconds] of every request that the hub's client
# makes, and `heavy()` what was imported that takes seconds
WATCH = """
import sys
from huggingface_hub.utils import get_session
asked = []
def note(request):
    asked.append([f"{request.method} {request.url.path}", sorted({*request.extensions["timeout"].values()})])
get_session().event_hooks["request"].append(note)
def heavy():
    return sorted({"torch", "pytorch_lightning", "transformers", "datasets"} & {*sys.modules})
"""
GUARD = 600  # seconds after which a process hangs; no test is about how long it takes


def environment(url: str, home: Path) -> dict[str, str]:
    """That of a client's process with this endpoint and this cache, and no proxy.

    In the cache is what the client otherwise asks the hub for before anything else, for its own statistics.
    """
    home.mkdir(parents=True, exist_ok=True)
    (home / ".agent_harnesses.json").write_text('{"harnesses": {}}')
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    return env | {"HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[1])}


class HubServer:
    """Serves `repos`: {"models" or "datasets": {id: folder}}; `requests` holds "METHOD path" of all that arrived.

    `breaks` names a file whose every transfer ends after half of what is left; with `dies`, the server goes with it.
    """

    def __init__(self, repos: dict[str, dict[str, Path]], *, gated: str = "", breaks: str = "", dies: bool = False):
        self.repos, self.gated, self.breaks, self.dies = repos, gated, breaks, dies
        self.ranges, self.dead = True, False
        self.status = 0  # answer everything with this status, if set
        self.card: dict[str, Any] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args: Any) -> None:
                pass  # a client that goes away is none of our business

        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, http: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(http.path).path)
        if self.dead:
            http.close_connection = True
            return None
        self.requests.append(f"{http.command} {path}")
        if self.status:
            return self._send(http, self.status, b"<html>sign in</html>", {}, body)
        if match := API.fullmatch(path):
            return self._api(http, match, body)
        if match := FILE.fullmatch(path):
            return self._file(http, match, body)
        return self._send(http, 404, b"", {}, body)

    def _api(self, http: BaseHTTPRequestHandler, match: re.Match[str], body: bool) -> None:
        folder = self.repos.get(match["kind"], {}).get(match["repo"])
        if folder is None:
            return self._send(http, 404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        if "/tree/" in (match["rest"] or ""):
            entry = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": _etag(p)}
                for n, p in zip(names, files, strict=True)
            ]
            return self._send(http, 200, json.dumps(entry).encode(), {"Content-Type": "application/json"}, body)
        info = {
            "id": match["repo"],
            "sha": COMMIT,
            "private": False,
            "disabled": False,
            "tags": [],
            "cardData": self.card,
            "siblings": [{"rfilename": n} for n in names],
        }
        return self._send(http, 200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)

    def _file(self, http: BaseHTTPRequestHandler, match: re.Match[str], body: bool) -> None:
        folder = self.repos.get("datasets" if match["kind"] else "models", {}).get(match["repo"])
        if match["repo"] == self.gated:
            return self._send(http, 401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body)
        file = folder / match["file"] if folder else None
        if file is None or not file.is_file():
            return self._send(http, 404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        data, status = file.read_bytes(), 200
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.ranges and (wanted := re.fullmatch(r"bytes=(\d+)-", http.headers.get("Range", ""))):
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        half = body and file.name == self.breaks
        self._send(http, status, data, headers, body, half=half)
        if half and self.dies:
            self.dead = True
            self.server.shutdown()
            self.server.server_close()
        return None

    def _send(
        self, http: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], body: bool, half=False
    ) -> None:
        http.send_response(status)
        for name, value in headers.items():
            http.send_header(name, value)
        http.send_header("Content-Length", str(len(data)))
        http.end_headers()
        if body:
            http.wfile.write(data[: len(data) // 2] if half else data)
            http.wfile.flush()
        if half:
            http.close_connection = True


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
