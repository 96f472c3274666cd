"""A hub on 127.0.0.1 for the unmodified huggingface_hub client: repositories of models, large files, commits, faults.

    with Hub(tmp_path) as hub:                            # files below tmp_path, a free port
        subprocess.run(command, env=hub.environment())    # HF_ENDPOINT, HF_TOKEN, a cache of its own
        hub.arm("die", 4)                                 # the fourth request from now on, and all after it, hang up
        hub.repositories["me/x"].files                    # {"README.md": "sha256 of its bytes", ...}

It is as strict as the real one: a write needs a token that may write, others do not see a private repository, a card
whose base_model or datasets are not ids is a 400, a commit on top of another parent than the last commit is a 412, and
bytes must have the announced sha256 and size.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER = "hf_" + "w" * 30, "hf_" + "r" * 30
OWN = {"me", "team"}
LARGE = (".safetensors", ".gguf", ".bin")
ID = re.compile(r"[\w.-]+/[\w.-]+")

Answer = tuple[int, dict[str, str], bytes]


class Refused(Exception):
    """A request answered with an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.answer: Answer = (
            status,
            {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}),
            json.dumps({"error": message}).encode(),
        )


@dataclass
class Repository:
    private: bool
    commits: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # id, sha256 of each file by name

    @property
    def files(self) -> dict[str, str]:
        return self.commits[-1][1]


class Hub:
    """The state of the hub, its faults, and the server while the `with` block lasts."""

    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.home = folder / "home"
        self.blobs.mkdir(parents=True)
        self.repositories: dict[str, Repository] = {}
        self.log: list[str] = []
        self._fault, self._left, self._lock = "", 0, threading.RLock()

    def __enter__(self) -> "Hub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token: str | None = WRITER, **more: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "HUGGING_FACE_HUB_TOKEN"}
        own = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(self.home), "NO_PROXY": "127.0.0.1"}
        return kept | own | ({"HF_TOKEN": token} if token else {}) | more

    def arm(self, fault: str, request: int) -> None:
        """Fail the n-th request: 429, 500 and drop without executing it; answer_lost after executing it; die and
        died_after fail all later ones too."""
        with self._lock:
            self._fault, self._left = fault, request

    def heal(self) -> bool:
        """End all faults; return True if one occurred."""
        with self._lock:
            met, self._fault, self._left = bool(self._fault) and self._left <= 0, "", 0
            return met

    def meet(self, act: Callable[[], Answer]) -> Answer | None:
        """Return the answer to a request, or the fault's; None closes the connection."""
        with self._lock:
            self._left -= 1
            fault = self._fault
            now, after = self._left == 0, self._left < 0
            if fault in ("429", "500") and now:
                return Refused(int(fault), "try later").answer
            if (fault in ("die", "died_after") and after) or (fault in ("die", "drop") and now):
                return None
            answer = act()
            return None if fault in ("answer_lost", "died_after") and now else answer

    def put(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """Commit files without the client; return the commit's id."""
        repository = self.repositories.setdefault(name, Repository(private))
        return self._commit(repository, {n: self.store(data) for n, data in files.items()}, b"".join(files.values()))

    def store(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (self.blobs / digest).write_bytes(data)
        return digest

    def read(self, digest: str) -> bytes:
        return (self.blobs / digest).read_bytes()

    def _commit(self, repository: Repository, files: dict[str, str | None], salt: bytes) -> str:
        before = repository.commits[-1][1] if repository.commits else {}
        now = {name: digest for name, digest in (before | files).items() if digest}
        commit = hashlib.sha1(salt + str(len(repository.commits)).encode()).hexdigest()
        repository.commits.append((commit, now))
        return commit

    # Requests. Each method takes the match of its path, the query, the body and the token.

    def whoami(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        if token is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        role = "write" if token == WRITER else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}
        return {"type": "user", "name": "me", "orgs": [{"name": "team"}], "auth": access}

    def create(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        asked = json.loads(body)
        owner = asked.get("organization") or "me"
        self._may_write(owner, token)
        name = f"{owner}/{asked['name']}"
        if name in self.repositories:
            raise Refused(409, "You already created this model repo")
        self.repositories[name] = Repository(asked.get("visibility") == "private")
        self._commit(self.repositories[name], {".gitattributes": self.store(b"* -text\n")}, name.encode())
        return {"url": f"{self.url}/{name}", "name": name, "id": "0"}

    def validate(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        errors = card_errors(json.loads(body)["content"])
        return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": []}

    def preupload(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        repository = self._seen(match[1], token)
        self._may_write(match[1].split("/")[0], token)
        return {
            "files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False, "oid": self._content_oid(f["path"], repository.files)}
                for f in json.loads(body)["files"]
            ]
        }  # fmt: skip

    def batch(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        self._may_write(match[1].split("/")[0], token)
        objects = []
        for one in json.loads(body)["objects"]:
            there = (self.blobs / one["oid"]).is_file()
            place = f"{self.url}/_large/{one['oid']}?size={one['size']}&signed={self._signature(one['oid'])}"
            actions = {"upload": {"href": place}, "verify": {"href": f"{self.url}/_verify", "header": {}}}
            objects.append(one if there else one | {"actions": actions})
        return {"transfer": "basic", "objects": objects}

    def large(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        if query.get("signed") != self._signature(match[1]):
            raise Refused(403, "not signed")
        if hashlib.sha256(body).hexdigest() != match[1] or len(body) != int(query["size"]):
            raise Refused(400, "other bytes than announced")
        self.store(body)
        return {}

    def verify(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        asked = json.loads(body)
        path = self.blobs / asked["oid"]
        if not path.is_file() or path.stat().st_size != asked["size"]:
            raise Refused(404, "not uploaded")
        return {}

    def commit(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        repository = self._seen(match[1], token)
        self._may_write(match[1].split("/")[0], token)
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != repository.commits[-1][0]:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files: dict[str, str | None] = {}
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if path.startswith("/") or ".." in path.split("/"):
                raise Refused(400, f"bad path {path}")
            match line["key"]:
                case "file":
                    data = base64.b64decode(value["content"])
                    if path == "README.md" and (errors := card_errors(data.decode())):
                        raise Refused(400, "; ".join(errors))
                    files[path] = self.store(data)
                case "lfsFile":
                    if not (self.blobs / value["oid"]).is_file():
                        raise Refused(400, f"{path} was not uploaded")
                    files[path] = value["oid"]
                case "deletedFile":
                    if path not in repository.files:
                        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
                    files[path] = None
                case other:
                    raise Refused(400, f"unknown operation {other}")
        commit = self._commit(repository, files, body)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{match[1]}/commit/{commit}"}

    def info(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        repository = self._seen(match[1], token)
        commit, files = self._at(repository, match[2])
        siblings = [{"rfilename": name} for name in sorted(files)]
        return {"id": match[1], "modelId": match[1], "sha": commit, "private": repository.private, "tags": [],
                "siblings": siblings, "downloads": 0, "likes": 0}  # fmt: skip

    def tree(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Any:
        _, files = self._at(self._seen(match[1], token), match[2])
        found = []
        for name in sorted(files):
            data = self.read(files[name])
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": self._oid(name, files)}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": files[name], "size": len(data), "pointerSize": 130}
            found.append(entry)
        return found

    def resolve(self, match: re.Match[str], query: dict[str, str], body: bytes, token: str | None) -> Answer:
        commit, files = self._at(self._seen(match[1], token), match[2])
        if match[3] not in files:
            status, headers, text = Refused(404, "Entry not found", "EntryNotFound").answer
            return status, headers | {"X-Repo-Commit": commit}, text
        tag = self._oid(match[3], files) if not match[3].endswith(LARGE) else files[match[3]]
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, self.read(files[match[3]])

    def _content_oid(self, name: str, files: dict[str, str]) -> str | None:
        """Return the sha256 of a large file, git's hash of another one."""
        return files.get(name) if name.endswith(LARGE) else self._oid(name, files)

    def _oid(self, name: str, files: dict[str, str]) -> str | None:
        """Return git's hash of a file, or of the pointer to a large one."""
        if name not in files:
            return None
        data = self.read(files[name])
        if name.endswith(LARGE):
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{files[name]}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _signature(self, digest: str) -> str:
        return hashlib.sha256(f"secret of this hub {digest}".encode()).hexdigest()[:16]

    def _may_write(self, owner: str, token: str | None) -> None:
        if token is None:
            raise Refused(401, "Invalid username or password.")
        if token != WRITER or owner not in OWN:
            raise Refused(403, f"you don't have the rights to write for {owner}")

    def _seen(self, name: str, token: str | None) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token is None):
            raise Refused(404 if token else 401, "Repository not found", "RepoNotFound")
        return repository

    def _at(self, repository: Repository, revision: str | None) -> tuple[str, dict[str, str]]:
        commits = dict(repository.commits)
        last = repository.commits[-1][0]
        commit = last if revision in (None, "main") else str(revision)
        if commit not in commits:
            raise Refused(404, "Revision not found", "RevisionNotFound")
        return commit, commits[commit]


ROUTES = [
    ("GET", r"/api/whoami-v2", Hub.whoami),
    ("POST", r"/api/repos/create", Hub.create),
    ("POST", r"/api/validate-yaml", Hub.validate),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/main", Hub.preupload),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/_large/([0-9a-f]{64})", Hub.large),
    ("POST", r"/_verify", Hub.verify),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/main", Hub.commit),
    ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", Hub.info),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", Hub.tree),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Hub.resolve),
]


class Handler(BaseHTTPRequestHandler):
    """Answers a request by the method in ROUTES, or closes the connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        answer = self.hub.meet(lambda: self._answer(body))
        self.hub.log.append(f"{self.command} {urlsplit(self.path).path} {answer[0] if answer else 'hung up'}")
        if answer is None:
            self.close_connection = True
            self.connection.close()
            return
        self._send(*answer)

    def _answer(self, body: bytes) -> Answer:
        asked = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(asked.query).items()}
        known = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        token = known if known in (WRITER, READER) else None
        method = "GET" if self.command == "HEAD" else self.command
        for command, pattern, act in ROUTES:
            match = re.fullmatch(pattern, unquote(asked.path))
            if match and command == method:
                try:
                    found = act(self.hub, match, query, body, token)
                except Refused as refused:
                    return refused.answer
                if isinstance(found, tuple) and len(found) == 3:
                    return found
                status, value = found if isinstance(found, tuple) else (200, found)
                return status, {"Content-Type": "application/json"}, json.dumps(value).encode()
        return Refused(404, f"this hub does not know {self.command} {asked.path}").answer

    def _send(self, status: int, headers: dict[str, str], data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and status == 200:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            status, headers = 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data = data[first : last + 1]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    do_GET = do_HEAD = do_POST = do_PUT = handle_any


def card_errors(content: str) -> list[str]:
    """Return the hub's errors for the YAML front matter of a card."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        fields = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    errors = []
    for name in ("base_model", "datasets"):
        values = fields.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not ID.fullmatch(str(value)):
                errors.append(f'"{name}" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    return errors
