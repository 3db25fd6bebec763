"""A small Hub on localhost: as much of its HTTP interface as creating, uploading to and loading a model repository takes."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_localtest"
Files = dict[str, bytes]


@dataclass
class Repo:
    """Every commit is a whole tree; branches point at commits."""

    private: bool
    gated: str | bool = False
    commits: list[tuple[str, Files]] = field(default_factory=lambda: [("0" * 40, {})])
    branches: dict[str, int] = field(default_factory=lambda: {"main": 0})
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, Files] | None:
        if revision in self.branches:
            return self.commits[self.branches[revision]]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    def commit(self, branch: str, files: Files, message: str) -> str:
        name = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.branches[branch] = len(self.commits)
        self.commits.append((name, files))
        self.messages.append(message)
        return name


class Hub(ThreadingHTTPServer):
    """Attributes: `repos` by user/name, `stored` by sha256 what came as large files, `requests` as `METHOD path`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Any:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{method} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":
            self.server.stored[parts[1]] = body
            return self._answer(200, {})
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if method in ("POST", "PUT") and not allowed:
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            return self._answer(200, {"name": "me", "type": "user"}) if allowed else self._answer(401, {"error": "no"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], body, allowed)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), allowed)
        return self._answer(404, {"error": f"no such endpoint: {path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _create(self, asked: dict[str, Any]) -> None:
        if asked.get("organization") != "me":
            return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        self.server.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return self._answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for item in asked["objects"]:
            action = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
            known = item["oid"] in self.server.stored
            objects.append({"oid": item["oid"], "size": item["size"]} | ({} if known else {"actions": action}))
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _api(self, name: str, rest: list[str], body: bytes, allowed: bool) -> None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not allowed):
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        verb, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        if verb == "branch":
            if revision in repo.branches:
                return self._answer(409, {"error": "Reference already exists"})
            repo.branches[revision] = repo.branches["main"]
            return self._answer(200, {})
        found = repo.at(revision)
        if found is None:
            return self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if verb == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self._answer(200, {"files": modes})
        if verb == "commit":
            return self._commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])
        if verb == "tree":
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in found[1].items()
            ]
            return self._answer(200, entries)
        card: dict[str, Any] = {}
        if text := found[1].get("README.md"):
            import yaml

            card = yaml.safe_load(text.split(b"---")[1])
        siblings = [{"rfilename": path} for path in found[1]]
        info = {"id": name, "sha": found[0], "private": repo.private, "gated": repo.gated, "siblings": siblings}
        return self._answer(200, info | {"cardData": card})

    def _commit(self, name: str, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.commits[repo.branches[branch]][1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        oid = repo.commit(branch, files, lines[0]["value"]["summary"])
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def _resolve(self, name: str, revision: str, path: str, allowed: bool) -> None:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not allowed):
            return self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        found = repo.at(revision)
        if found is None:
            return self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        if path not in found[1]:
            return self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": found[0]})
        data = found[1][path]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": found[0]}
        return self._send(200, data, headers | {"Content-Type": "application/octet-stream"})

    def _answer(self, code: int, data: Any, headers: dict[str, str] | None = None) -> None:
        self._send(code, json.dumps(data).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
