"""A small Hub for tests: a server, in a process of its own, that speaks as much of the Hub's API as is needed here.

What it says was read off the client, `huggingface_hub`, not off the Hub. Repositories of models, private ones too;
users, whose tokens are `hf_<name>`; commits with files in them or uploaded before by the protocol of Git LFS;
downloads. It knows no Xet, so clients run with `HF_HUB_DISABLE_XET=1`.

    python tests/hub_server.py [--ends_at PATTERN]

It prints its address; with `--ends_at` it is gone at the first request whose method and path match.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = {
    r"GET /api/whoami-v2": "who_am_i",
    r"POST /api/validate-yaml": "validate_yaml",
    r"POST /api/repos/create": "create",
    rf"GET /api/models/{REPO}/auth-check(?P<write>/write)?": "check_access",
    rf"GET /api/models/{REPO}(/revision/(?P<revision>[^/]+))?": "info",
    rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)": "tree",
    rf"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)": "choose_uploads",
    rf"POST /{REPO}\.git/info/lfs/objects/batch": "choose_objects",
    r"PUT /objects/(?P<oid>[0-9a-f]{64})": "take_object",
    rf"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)": "commit",
    rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": "file",
}
LARGE = (".safetensors", ".mp4")


class Refusal(Exception):
    """An answer that is an error: its status, the message, and the code the client knows it by."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


@dataclass
class Repo:
    """A repository: the files of every commit, by path."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        if revision == "main":
            return list(self.commits.items())[-1]
        if revision not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return revision, self.commits[revision]


class Hub(ThreadingHTTPServer):
    """All that the server knows."""

    def __init__(self, ends_at: str | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ends_at = ends_at
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        request = f"{self.command} {urlsplit(self.path).path}"
        if self.server.ends_at and re.search(self.server.ends_at, request):
            os._exit(0)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for pattern, name in ROUTES.items():
                if match := re.fullmatch(pattern, request):
                    values = {k: v and unquote(v) for k, v in match.groupdict().items()}
                    with self.server.lock:
                        return getattr(self, name)(**values)
            raise Refusal(404, f"This Hub knows no {request}.")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
            self.answer(json.dumps({"error": refusal.message}).encode(), refusal.status, headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, content: bytes, status: int = 200, headers: dict[str, str | None] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def tell(self, values: object) -> None:
        self.answer(json.dumps(values).encode())

    def log_message(self, format: str, *values: object) -> None:
        """Nobody reads what it would tell of every request."""

    @property
    def user(self) -> str | None:
        """Whose token came along."""
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if not given.startswith("Bearer hf_"):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return given.removeprefix("Bearer hf_")

    def repo(self, name: str, write: bool = False) -> Repo:
        repo = self.server.repos.get(name)
        is_owner = self.user == name.split("/")[0]
        if repo is None or (repo.private and not is_owner):
            # Nobody is told whether it exists.
            if self.user is None:
                raise Refusal(401, "Invalid username or password.")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and not is_owner:
            raise Refusal(401 if self.user is None else 403, f"You have no rights to write to {name}")
        return repo

    def who_am_i(self) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        self.tell({"type": "user", "name": self.user, "orgs": []})

    def validate_yaml(self) -> None:
        self.tell({"errors": [], "warnings": []})

    def create(self) -> None:
        wanted = json.loads(self.body)
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        owner = wanted["organization"] or self.user
        if owner != self.user:
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{wanted['name']}"
        values = {"url": f"{self.server.address}/{name}", "name": name}
        if name in self.server.repos:
            return self.answer(json.dumps({**values, "error": "You already created this model repo"}).encode(), 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repos[name] = Repo(private=bool(private))
        self.tell(values)

    def check_access(self, repo: str, write: str | None) -> None:
        self.repo(repo, write=write is not None)
        self.tell({})

    def info(self, repo: str, revision: str | None) -> None:
        sha, files = self.repo(repo).at(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        self.tell(
            {"_id": "0", "id": repo, "sha": sha, "private": self.repo(repo).private, "tags": [], "siblings": siblings}
        )

    def tree(self, repo: str, revision: str) -> None:
        _, files = self.repo(repo).at(revision)
        entries = []
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self.tell(entries)

    def choose_uploads(self, repo: str, revision: str) -> None:
        self.repo(repo, write=True)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        self.tell({"files": [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in paths]})

    def choose_objects(self, repo: str) -> None:
        self.repo(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.address}/objects/{wanted['oid']}"}}
            has_it = wanted["oid"] in self.server.objects
            objects.append({**wanted, **({} if has_it else {"actions": upload})})
        self.answer(
            json.dumps({"transfer": "basic", "objects": objects}).encode(),
            headers={"Content-Type": "application/vnd.git-lfs+json"},
        )

    def take_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, f"What came is not {oid}")
        self.server.objects[oid] = self.body
        self.tell({})

    def commit(self, repo: str, revision: str) -> None:
        _, files = self.repo(repo, write=True).at(revision)
        files = dict(files)
        for line in self.body.splitlines():
            kind, value = (item := json.loads(line))["key"], item["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        digest = hashlib.sha1(repr((len(self.server.repos[repo].commits), sorted(files.items()))).encode())
        sha = digest.hexdigest()
        self.server.repos[repo].commits[sha] = files
        url = f"{self.server.address}/{repo}/commit/{sha}"
        self.tell({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def file(self, repo: str, revision: str, path: str) -> None:
        sha, files = self.repo(repo).at(revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        hashed = hashlib.sha256 if path.endswith(LARGE) else hashlib.sha1
        self.answer(files[path], headers={"X-Repo-Commit": sha, "ETag": f'"{hashed(files[path]).hexdigest()}"'})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ends_at")
    hub = Hub(parser.parse_args().ends_at)
    print(hub.address, flush=True)
    hub.serve_forever()
