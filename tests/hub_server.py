# Copyright 2026 The peft_spon authors.
# SPDX-License-Identifier: Apache-2.0
"""A small Hub in memory, on loopback, that the real huggingface_hub client talks to over HTTP.

Model repositories with branches, tags and commits, public and private; large files through LFS to and from a second
server that stands for the file storage; errors with the status and headers of the real Hub. No Xet, no pull requests.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


@dataclass
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    def entry(self, path: str) -> dict:
        found = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        lfs = {"oid": self.oid, "size": len(self.content), "pointerSize": 130}
        return {**found, "lfs": lfs} if self.is_lfs else found


@dataclass
class Repo:
    owner: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # every file of every commit
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        text = f"{len(self.commits)} {branch} {[(path, file.oid) for path, file in sorted(files.items())]}"
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def find(self, revision: str) -> str:
        """The commit of a branch, a tag or a commit hash."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = status, {"error": message, **body}, headers


class FakeHub:
    """`with FakeHub({token: user}) as hub:`; the client's HF_ENDPOINT is `hub.url`."""

    def __init__(self, users: dict[str, str]):
        self.users = users
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # what was uploaded through LFS, by sha256
        self.fetched: list[str] = []  # sha256 of what was downloaded from the storage
        self.lock = threading.Lock()

    def __enter__(self):
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(self, routes)) for routes in (HUB, STORAGE)]
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)
        for server in self.servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, File]:
        return self.repos[name].commits[self.repos[name].find(revision)]

    def repo(self, user: str | None, name: str, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and user != repo.owner):  # that a private one exists is nobody's business
            raise Refused(404 if user else 401, "Repository not found" if user else ANONYMOUS, "RepoNotFound")
        if write and user != repo.owner:
            raise Refused(403 if user else 401, "Authorization error." if user else ANONYMOUS)
        return repo


ANONYMOUS = "Invalid username or password."


# ---- what the Hub answers: (hub, request, parts of the path) -> body, or (status, body, headers) -------------------


def whoami(hub, request):
    if request.user is None:
        raise Refused(401, ANONYMOUS)
    return {"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}


def create_repo(hub, request):
    user, body = whoami(hub, request)["name"], request.json()
    owner = body.get("organization") or user
    name = f"{owner}/{body['name']}"
    if user != owner:
        raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    if name in hub.repos:
        raise Refused(409, "You already created this model repo", url=f"{hub.url}/{name}")
    hub.repos[name] = Repo(owner, private=body.get("visibility") == "private" or body.get("private", False))
    hub.repos[name].commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n", is_lfs=False)})
    return {"name": name, "url": f"{hub.url}/{name}"}


def validate_yaml(hub, request):
    found = re.match(r"---\n(.*?)\n---\n", request.json()["content"], re.DOTALL)
    base = (yaml.safe_load(found[1]) if found else {}).get("base_model", "x")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        raise Refused(400, message, errors=[{"message": message}], warnings=[])
    return {"errors": [], "warnings": []}


def preupload(hub, request, name, revision):
    hub.repo(request.user, name, write=True)
    paths = [entry["path"] for entry in request.json()["files"]]
    modes = ["lfs" if path.endswith((".safetensors", ".bin")) else "regular" for path in paths]
    entries = zip(paths, modes, strict=True)
    return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in entries]}


def lfs_batch(hub, request, name):
    hub.repo(request.user, name, write=True)
    objects = request.json()["objects"]
    for entry in objects:
        if entry["oid"] not in hub.stored:
            actions = {"upload": f"{hub.storage}/{entry['oid']}", "verify": f"{hub.url}/{name}.git/info/lfs/verify"}
            entry["actions"] = {key: {"href": href} for key, href in actions.items()}
    return {"transfer": "basic", "objects": objects}


def lfs_verify(hub, request, name):
    body = request.json()
    if len(hub.stored.get(body["oid"], b"")) != body["size"]:
        raise Refused(422, "The uploaded file is not whole")
    return {}


def commit(hub, request, name, revision):
    repo = hub.repo(request.user, name, write=True)
    files = dict(repo.commits[repo.find(revision)])
    for line in request.body.splitlines():
        operation = json.loads(line)
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), is_lfs=False)
        elif operation["key"] == "lfsFile":
            files[value["path"]] = File(hub.stored[value["oid"]], is_lfs=True)
    oid = repo.commit(revision, files)
    return {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"}


def info(hub, request, name, revision="main"):
    repo = hub.repo(request.user, name)
    oid = repo.find(revision)
    siblings = [{"rfilename": path} for path in repo.commits[oid]]
    return {"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []}


def tree(hub, request, name, revision, folder=""):
    repo = hub.repo(request.user, name)
    files = repo.commits[repo.find(revision)]
    found = [file.entry(path) for path, file in files.items() if path.startswith(f"{folder}/".lstrip("/"))]
    if not found:
        raise Refused(404, f"{folder} does not exist on '{revision}'", "EntryNotFound")
    return found


def paths_info(hub, request, name, revision):
    repo = hub.repo(request.user, name)
    files = repo.commits[repo.find(revision)]
    return [files[path].entry(path) for path in parse_qs(request.body.decode())["paths"] if path in files]


def create_branch(hub, request, name, branch):
    repo = hub.repo(request.user, name, write=True)
    if branch in repo.branches:
        raise Refused(409, "Reference already exists")
    repo.branches[branch] = repo.find(request.json().get("startingPoint", "main"))
    return {}


def create_tag(hub, request, name, revision):
    repo = hub.repo(request.user, name, write=True)
    repo.tags[request.json()["tag"]] = repo.find(revision)
    return {}


def resolve(hub, request, name, revision, path):
    repo = hub.repo(request.user, name)
    oid = repo.find(revision)
    file = repo.commits[oid].get(path)
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
    headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}
    if not file.is_lfs:
        return 200, file.content, headers
    linked = {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
    return 302, b"", {**headers, **linked, "Location": f"{hub.storage}/{file.oid}"}


def store(hub, request, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "This is not the announced file")
    hub.stored[oid] = request.body
    return {}


def fetch(hub, request, oid):
    hub.fetched.append(oid)
    return 200, hub.stored[oid], {}


NAME, REVISION = "(?P<name>[^/]+/[^/]+)", "(?P<revision>[^/]+)"
REPO, OID = f"/api/models/{NAME}", "(?P<oid>[0-9a-f]{64})"
HUB = {
    "GET /api/whoami-v2": whoami,
    "POST /api/repos/create": create_repo,
    "POST /api/validate-yaml": validate_yaml,
    f"POST {REPO}/preupload/{REVISION}": preupload,
    f"POST /{NAME}.git/info/lfs/objects/batch": lfs_batch,
    f"POST /{NAME}.git/info/lfs/verify": lfs_verify,
    f"POST {REPO}/commit/{REVISION}": commit,
    f"GET {REPO}": info,
    f"GET {REPO}/revision/{REVISION}": info,
    f"GET {REPO}/tree/{REVISION}": tree,
    f"GET {REPO}/tree/{REVISION}/(?P<folder>.+)": tree,
    f"POST {REPO}/paths-info/{REVISION}": paths_info,
    f"POST {REPO}/branch/(?P<branch>[^/]+)": create_branch,
    f"POST {REPO}/tag/{REVISION}": create_tag,
    f"(HEAD|GET) /{NAME}/resolve/{REVISION}/(?P<path>.+)": resolve,
}
STORAGE = {f"PUT /{OID}": store, f"GET /{OID}": fetch}


def handler(hub: FakeHub, routes: dict) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def json(self):
            return json.loads(self.body or b"{}")

        def find_answer(self):
            """Who asks, and what the function of the route that fits says."""
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and routes is STORAGE:
                raise Refused(400, "A token was sent to the storage")
            if token and token not in hub.users:
                raise Refused(401, "Invalid credentials in Authorization header")
            self.user = hub.users.get(token)
            line = f"{self.command} {urlsplit(self.path).path}"
            for pattern, function in routes.items():
                if found := re.fullmatch(pattern, line):
                    return function(hub, self, **{key: unquote(part) for key, part in found.groupdict().items()})
            raise Refused(404, f"This little Hub has no {line}")

        def handle_request(self):
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            try:
                with hub.lock:
                    answer = self.find_answer()
            except Refused as refused:
                answer = refused.answer
            status, body, headers = answer if isinstance(answer, tuple) else (200, answer, {})
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = do_PUT = handle_request

        def log_message(self, *args):
            pass

    return Handler
