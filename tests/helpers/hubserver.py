"""A stand-in of the hub on this machine: the few endpoints that huggingface_hub needs to make, fill, read repositories."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

WRITES, READS = "hf_writes", "hf_reads_only"  # tokens


@dataclass
class Repo:
    """Branches name commits, commits hold files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, changes: dict[str, bytes], message: str) -> str:
        files = {**self.commits.get(self.branches.get(branch, ""), {}), **changes}
        oid = hashlib.sha1(f"{branch}{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class Hub(ThreadingHTTPServer):
    """Serves on a free port of this machine; `repos`, and `requests` as (method, path), are there to look at."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def make(self, name: str, files: dict[str, bytes], private: bool = False) -> Repo:
        """A repository that is there already."""
        self.repos[name] = Repo(private)
        self.repos[name].commit("main", {".gitattributes": b"", **files}, "initial commit")
        return self.repos[name]

    def sent(self) -> list[str]:
        """What was asked for other than reading."""
        return [path for method, path in self.requests if method in ("POST", "PUT") and "validate-yaml" not in path]


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to, with its cache in `folder`; logged in with a token that may write."""
    import huggingface_hub.constants as constants

    server = Hub()
    point_to(monkeypatch, server.url)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"):
        monkeypatch.setattr(constants, name, name.endswith("XET"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.setenv("HF_TOKEN", WRITES)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def point_to(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """huggingface_hub talks to `url`."""
    import huggingface_hub.constants as constants
    import huggingface_hub.file_download as file_download

    template = "HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # older clients have it under both names
        if hasattr(module, template):
            monkeypatch.setattr(module, template, url + "/{repo_id}/resolve/{revision}/{filename}")


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.server.requests.append((method, path))
        line = f"{'GET' if method == 'HEAD' else method} {path}"
        for pattern, name in ROUTES:
            if found := re.fullmatch(pattern, line):
                getattr(self, name)(*found.groups(), body=body)
                return
        self.say(404, {"error": f"no such place: {path}"})

    def say(self, status: int, tree: Any = None, error: str = "", **headers: str) -> None:
        self.send(status, json.dumps(tree if tree is not None else {}).encode(), "application/json", error, **headers)

    def send(self, status: int, content: bytes, kind: str, error: str = "", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in {**headers, **({"X-Error-Code": error} if error else {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # who, and what

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self) -> bool:
        if self.token() == WRITES:
            return True
        if self.token() == READS:
            self.say(403, {"error": "You don't have the rights to create a model under this namespace"})
        else:
            self.say(401, {"error": "Invalid username or password."})
        return False

    def repo(self, name: str) -> Repo | None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self.token() not in (WRITES, READS)):
            self.say(404 if self.token() else 401, {"error": "Repository not found"}, "RepoNotFound")
            return None
        return repo

    # endpoints

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.may_write():
            return
        if name in self.server.repos:
            return self.say(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        self.server.make(name, {}, bool(asked.get("private") or asked.get("visibility") == "private"))
        self.say(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def info(self, name: str, revision: str | None = None, body: bytes = b"") -> None:
        if repo := self.repo(name):
            oid = repo.at(revision or "main")
            if oid is None:
                return self.say(404, {"error": "Invalid rev id"}, "RevisionNotFound")
            siblings = [{"rfilename": path} for path in repo.commits[oid]]
            self.say(200, {"id": name, "modelId": name, "private": repo.private, "sha": oid, "siblings": siblings})

    def tree(self, name: str, revision: str, body: bytes = b"") -> None:
        if repo := self.repo(name):
            oid = repo.at(revision)
            if oid is None:
                return self.say(404, {"error": "Invalid rev id"}, "RevisionNotFound")
            files = repo.commits[oid].items()
            self.say(
                200, [{"type": "file", "oid": etag(data), "size": len(data), "path": path} for path, data in files]
            )

    def branch(self, name: str, branch: str, body: bytes) -> None:
        if self.may_write() and (repo := self.repo(name)):
            if branch in repo.branches:
                return self.say(409, {"error": "Reference already exists"})
            repo.branches[branch] = repo.branches["main"]
            self.say(200)

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        if self.may_write() and self.repo(name):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            self.say(200, {"files": files})

    def lfs(self, name: str, body: bytes) -> None:
        objects = [
            {**o, "authenticated": True, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
            for o in json.loads(body)["objects"]
        ]
        self.say(200, {"transfer": "basic", "objects": objects})

    def blob(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.say(200)

    def commit(self, name: str, revision: str, body: bytes) -> None:
        if not self.may_write() or (repo := self.repo(name)) is None:
            return
        if revision not in repo.branches:
            return self.say(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        changes, message = {}, ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            else:
                changes[value["path"]] = self.server.blobs[value["oid"]]
        oid = repo.commit(revision, changes, message)
        self.say(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def resolve(self, name: str, revision: str, path: str, body: bytes = b"") -> None:
        if repo := self.repo(name):
            oid = repo.at(revision)
            if oid is None:
                return self.say(404, {"error": "Invalid rev id"}, "RevisionNotFound")
            if path not in repo.commits[oid]:
                return self.say(404, {"error": "Entry not found"}, "EntryNotFound", X_Repo_Commit=oid)
            data = repo.commits[oid][path]
            self.send(200, data, "application/octet-stream", ETag=f'"{etag(data)}"', X_Repo_Commit=oid)

    def yaml(self, body: bytes) -> None:
        self.say(200, {"errors": [], "warnings": []})


ROUTES = (
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "yaml"),
    (r"GET /api/models/([^/]+/[^/]+)", "info"),
    (r"GET /api/models/([^/]+/[^/]+)/revision/(.+)", "info"),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)/?", "tree"),
    (r"POST /api/models/([^/]+/[^/]+)/branch/(.+)", "branch"),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/(.+)", "preupload"),
    (r"POST /api/models/([^/]+/[^/]+)/commit/(.+)", "commit"),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs"),
    (r"PUT /lfs/(\w+)", "blob"),
    (r"GET /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
