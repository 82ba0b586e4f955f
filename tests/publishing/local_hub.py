"""The part of the Hub's protocol that a push needs, over HTTP on this machine; what arrives lies in a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "a-token-that-may-write"


class LocalHub(ThreadingHTTPServer):
    """Repositories as folders below `folder`; `private` and `tags` of each by its name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.private: dict[str, bool] = {}
        self.tags: dict[str, dict[str, str]] = {}
        self.commits: dict[str, list[str]] = {}  # messages
        self.objects: dict[str, bytes] = {}  # large files by SHA-256
        self.offered: list[str] = []  # what was uploaded as a large file

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def create(self, repository: str, private: bool) -> None:
        self.private[repository] = private
        self.tags[repository], self.commits[repository] = {}, []
        (self.folder / repository).mkdir(parents=True)

    def head(self, repository: str) -> str:
        told = f"{repository}{len(self.commits[repository])}"
        return hashlib.sha1(told.encode()).hexdigest()

    def files(self, repository: str) -> dict[str, Path]:
        root = self.folder / repository
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def commit(self, repository: str, lines: list[dict[str, Any]]) -> str:
        root = self.folder / repository
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits[repository].append(value["summary"])
            elif line["key"] == "deletedFile":
                (root / value["path"]).unlink()
            else:
                large = line["key"] == "lfsFile"
                content = self.objects[value["oid"]] if large else base64.b64decode(value["content"])
                path = root / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return self.head(repository)


class _Handler(BaseHTTPRequestHandler):
    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        repository, rest = self._repository("/api/models/")
        if repository not in self.server.private:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest.startswith("tree/"):
            files = self.server.files(repository)
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _git_oid(path.read_bytes())}
                for name, path in files.items()
            ]
            return self._answer(200, tree)
        siblings = [{"rfilename": name} for name in self.server.files(repository)]
        told = {"id": repository, "private": self.server.private[repository], "siblings": siblings}
        return self._answer(200, {**told, "sha": self.server.head(repository)})

    def do_PUT(self) -> None:
        self.server.objects[self.path.rsplit("/", 1)[1]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        hub = self.server
        if self.path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
            if name in hub.private:
                return self._answer(409, {"url": f"{hub.address}/{name}"})
            hub.create(name, told.get("private") or told.get("visibility") == "private")
            return self._answer(200, {"url": f"{hub.address}/{name}", "name": name})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            hub.offered += [one["oid"] for one in objects]
            upload = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/objects/{one['oid']}"}}} for one in objects
            ]
            return self._answer(200, {"transfer": "basic", "objects": upload})
        repository, rest = self._repository("/api/models/")
        if rest.startswith("preupload/"):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith((".safetensors", ".onnx")) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if rest.startswith("commit/"):
            commit = hub.commit(repository, [json.loads(line) for line in body.splitlines()])
            url = f"{hub.address}/{repository}/commit/{commit}"
            return self._answer(200, {"success": True, "commitOid": commit, "commitUrl": url})
        if rest.startswith("tag/"):
            hub.tags[repository][json.loads(body)["tag"]] = rest.removeprefix("tag/")
            return self._answer(200, {})
        return self._answer(404, {"error": f"unknown {self.path}"})

    def _repository(self, prefix: str) -> tuple[str, str]:
        parts = self.path.split("?")[0].removeprefix(prefix).split("/")
        return "/".join(parts[:2]), "/".join(parts[2:])

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        told = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the tests look at what arrived."""


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(folder: Path) -> Iterator[LocalHub]:
    hub = LocalHub(folder)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
