"""A small Hugging Face Hub on the loopback interface, for the real client.

It speaks the part of the Hub's HTTP interface that creating, committing, listing and downloading need, with
large files through LFS. Commits are atomic: a refused commit changes nothing. Repositories whose name ends in
"-broken" refuse every commit after its files were uploaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN, READ_TOKEN, WRONG_TOKEN = ("hf_" + letter * 34 for letter in "wrx")
OWNER = "painter"
READERS = "gallery"  # organization of the owner of the tokens, who may only read there


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # branch or pull request -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    messages: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        commit = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        self.messages.append(message)
        return commit


class LoopbackHub:
    """Context manager that serves repositories at `endpoint`.

    Attributes:
        repositories: id to `Repository`.
        requests: method and path of everything that was asked.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches[branch]]


class Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {url.path}")
        self.query = parse_qs(url.query)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self._chunk, b""))
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._route([unquote(part) for part in url.path.strip("/").split("/")])
        except Refusal as refusal:
            headers = {"X-Error-Message": str(refusal), "X-Error-Code": refusal.code}
            self._send(json.dumps({"error": str(refusal)}).encode(), refusal.status, headers)

    def _chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    def _route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "whoami-v2"]:
                role = "write" if self._require_token() == WRITE_TOKEN else "read"
                auth = {"type": "access_token", "accessToken": {"displayName": "tests", "role": role}}
                self._json(
                    {"type": "user", "name": OWNER, "orgs": [{"name": READERS, "roleInOrg": "read"}], "auth": auth}
                )
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                self._validate_card()
            case ["api", "models", owner, name]:
                self._info(f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", *revision]:
                self._info(f"{owner}/{name}", "/".join(revision))
            case ["api", "models", owner, name, "tree", revision]:
                _, files = self._files(f"{owner}/{name}", revision)
                self._json([_entry(path, content) for path, content in files.items()])
            case ["api", "models", owner, name, "branch", branch]:
                repository = self._writable(f"{owner}/{name}")
                if branch in repository.branches:
                    raise Refusal(409, "Reference already exists")
                repository.branches[branch] = repository.branches["main"]
                self._json({})
            case ["api", "models", owner, name, "preupload", _]:
                self._writable(f"{owner}/{name}")
                wanted = json.loads(self.body)["files"]
                self._json({"files": [{**_mode(one["path"]), "path": one["path"]} for one in wanted]})
            case ["api", "models", owner, name, "commit", revision]:
                self._commit(f"{owner}/{name}", revision)
            case [owner, git, "info", "lfs", "objects", "batch"]:
                self._writable(f"{owner}/{git.removesuffix('.git')}")
                self._json(
                    {
                        "transfer": "basic",
                        "objects": [self._large(one) for one in json.loads(self.body)["objects"]],
                    }
                )
            case ["large", oid]:
                if hashlib.sha256(self.body).hexdigest() != oid:
                    raise Refusal(400, "the content does not have this hash")
                self.hub.large_files[oid] = self.body
                self._send(b"")
            case [owner, name, "resolve", revision, *path]:
                self._download(f"{owner}/{name}", revision, "/".join(path))
            case _:
                raise Refusal(404, f"no such address: {self.path}")

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def _require_token(self) -> str:
        token = self._token()
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        return token

    def _require_writer(self, owner: str) -> None:
        if self._require_token() != WRITE_TOKEN or owner != OWNER:
            raise Refusal(403, "You don't have the rights to write to this repository")

    def _repository(self, repo_id: str) -> Repository:
        token, repository = self._token(), self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and token is None):
            raise Refusal(401 if token is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, repo_id: str) -> Repository:
        self._require_writer(repo_id.partition("/")[0])
        return self._repository(repo_id)

    def _files(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(repo_id)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository.commits[commit]

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        self._require_writer(repo_id.partition("/")[0])
        exists = repo_id in self.hub.repositories
        if not exists:
            repository = Repository(private=wanted.get("visibility") == "private")
            repository.add("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self.hub.repositories[repo_id] = repository
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        self._json(answer, 409 if exists else 200)

    def _validate_card(self) -> None:
        errors = []
        try:
            matter = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
            if matter.get("license") == "other" and "license_name" not in matter:
                errors.append({"message": '"license_name" is required when license is "other"'})
        except (yaml.YAMLError, IndexError) as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _info(self, repo_id: str, revision: str) -> None:
        commit, files = self._files(repo_id, revision)
        card = files.get("README.md", b"").decode()
        matter = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else None
        siblings = [{"rfilename": path} for path in files]
        private = self.hub.repositories[repo_id].private
        self._json(
            {
                "id": repo_id,
                "sha": commit,
                "private": private,
                "siblings": siblings,
                "cardData": matter,
                "tags": [],
            }
        )

    def _large(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.large_files:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}"}}}

    def _commit(self, repo_id: str, revision: str) -> None:
        repository = self._writable(repo_id)
        _, current = self._files(repo_id, revision)
        files, message = dict(current), ""
        for line in self.body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.large_files:
                        raise Refusal(400, f"{value['path']}: its content was never uploaded")
                    files[value["path"]] = self.hub.large_files[value["oid"]]
                case "deletedFile":
                    if value["path"] not in files:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
                    del files[value["path"]]
                case other:
                    raise Refusal(400, f"unknown operation {other}")
        if repo_id.endswith("-broken"):
            raise Refusal(500, "Internal Error")
        is_pull_request = self.query.get("create_pr") == ["1"]
        branch = "refs/pr/1" if is_pull_request else revision
        commit = repository.add(branch, files, message)
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}", "commitOid": commit}
        if is_pull_request:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/1"
        self._json(answer)

    def _download(self, repo_id: str, revision: str, path: str) -> None:
        commit, files = self._files(repo_id, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        entry = _entry(path, files[path])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        self._send(files[path], headers={"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _mode(path: str) -> dict[str, Any]:
    return {
        "uploadMode": "lfs" if path.endswith((".safetensors", ".png")) else "regular",
        "shouldIgnore": False,
    }


def _entry(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if _mode(path)["uploadMode"] == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
