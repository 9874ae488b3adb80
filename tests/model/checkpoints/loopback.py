"""A server on this machine that speaks as much of Kaggle's and the Hub's protocols as their clients need."""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Loopback(ThreadingHTTPServer):
    """Serves the files of a folder as one model.

    refuse: a status for every request for the model. headers: sent with it. cut: bytes after which the first answer
    with a file of that name ends early. stall: names of files of which nothing comes after the headers. spoil: names
    of files that come with a wrong byte. asked: every request, as (method, path). ranges: where each download of a
    file that was cut once began.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in _files(folder)}
        self.refuse, self.headers = 0, {}
        self.cut: dict[str, int] = {}
        self.stall: set[str] = set()
        self.spoil: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.ranges: dict[str, list[int]] = {}
        self.sends_md5 = True
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self) -> list[str]:
        """Names of files whose content was asked for."""
        return [
            name for method, path in self.asked if method == "GET" for name in self.files if path.endswith(f"/{name}")
        ]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Loopback

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client went away
            super().handle()

    def do_POST(self):  # Kaggle's calls; through a proxy, so the path is a whole address
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        call = urlsplit(self.path).path.rpartition("/")[2]
        self.server.asked.append(("POST", call))
        if self.server.refuse:
            self._json({"code": self.server.refuse, "message": "no"}, self.server.refuse)
        elif call == "GetModelInstance":
            self._json({"versionNumber": 3})
        elif call == "ListModelInstanceVersionFiles":
            files = [{"name": name, "size": len(content)} for name, content in self.server.files.items()]
            self._json({"files": files, "nextPageToken": ""})
        else:
            self.send_response(302)
            self.send_header("Location", f"http://localhost/blob/{body['path']}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path))
        if path.startswith("/blob/"):
            return self._file(path.removeprefix("/blob/"))
        if self.server.refuse:
            return self._json({"error": "no"}, self.server.refuse)
        found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        if found:
            return self._file(found[3]) if found[3] in self.server.files else self._json({}, 404)
        if re.fullmatch(r"/api/models/[\w.-]+/[\w.-]+(/revision/[^/]+)?", path):
            files = [{"rfilename": name} for name in self.server.files]
            return self._json({"id": "google/gemma-3-tiny", "sha": COMMIT, "siblings": files})
        tree = re.fullmatch(r"/api/models/[\w.-]+/[\w.-]+/tree/[^/]+/?(.*)", path)
        if tree:
            return self._json([_entry(name, content) for name, content in self.server.files.items()])
        return self._json({"error": "unknown"}, 404)

    def _json(self, content, status: int = 200):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self, name: str):
        content = self.server.files[name]
        start = int(re.search(r"\d+", self.headers.get("Range") or "0")[0])
        self.send_response(206 if start else 200)
        sums = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.server.sends_md5:
            sums["x-goog-hash"] = "md5=" + base64.b64encode(hashlib.md5(content).digest()).decode()
        sums["X-Linked-Size"], sums["X-Linked-ETag"] = str(len(content)), sums["ETag"]
        for key, value in {**sums, "Accept-Ranges": "bytes", "Content-Length": len(content) - start}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.server.stall:
            time.sleep(30)
        if name in self.server.spoil:
            content = content[:-1] + bytes([content[-1] ^ 1])
        n_sent = self.server.cut.pop(name, None)
        if n_sent is not None or name in self.server.ranges:
            self.server.ranges.setdefault(name, []).append(start)
        self.wfile.write(content[start : None if n_sent is None else start + n_sent])
        if n_sent is not None:
            self.close_connection = True


def _entry(name: str, content: bytes) -> dict:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
