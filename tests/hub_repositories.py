"""What a Hub holds, and its right answer to each request of huggingface_hub 2.4's protocol with Xet switched off.

Model repositories with branches, regular and LFS files, and one commit per call of the commit route, all in memory.
"""

import base64
import fnmatch
import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from typing import NamedTuple


USER = "tester"
LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.npz", "*.onnx", "*.gz", "*.zip")

REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
PATH = r"(?P<path>.+)"
ROUTES = {
    "whoami": "GET /api/whoami-v2",
    "access": f"GET /api/models/{REPO}/auth-check(/write)?",
    "create": "POST /api/repos/create",
    "info": f"GET /api/models/{REPO}(/revision/{REVISION})?",
    "tree": f"GET /api/models/{REPO}/tree/{REVISION}(/{PATH})?",
    "history": f"GET /api/models/{REPO}/commits/{REVISION}",
    "branch": f"POST /api/models/{REPO}/branch/{REVISION}",
    "validate_yaml": "POST /api/validate-yaml",
    "preupload": f"POST /api/models/{REPO}/preupload/{REVISION}",
    "lfs_batch": rf"POST /{REPO}\.git/info/lfs/objects/batch",
    "lfs_upload": "PUT /lfs/(?P<oid>[0-9a-f]{64})",
    "lfs_verify": rf"POST /{REPO}\.git/info/lfs/objects/verify",
    "commit": f"POST /api/models/{REPO}/commit/{REVISION}",
    "head": f"HEAD /{REPO}/resolve/{REVISION}/{PATH}",
    "download": f"GET /{REPO}/resolve/{REVISION}/{PATH}",
}
# An LFS file's upload, unlike all other writing, is allowed by its address (the Hub signs it) and not by the token.
NEED_TOKEN = {"whoami", "access", "create", "branch", "preupload", "lfs_batch", "lfs_verify", "commit"}


@dataclass(frozen=True)
class Commit:
    """What a repository holds since a commit: `files` maps every path to its content, `lfs` names those kept as LFS."""

    sha: str
    message: str
    files: dict[str, bytes]
    lfs: frozenset[str]
    date: str


@dataclass(frozen=True)
class Request:
    """One request: what its route's pattern found in the address, its query, headers and body."""

    query: dict[str, list[str]]
    headers: Message
    body: bytes
    repo: str | None = None
    revision: str | None = None
    path: str | None = None
    oid: str | None = None

    def json(self):
        return json.loads(self.body)


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


class HubError(Exception):
    """A request that the Hub answers with an error; `code` is what the client chooses its exception class by."""

    def __init__(self, status, message, code=None):
        self.answer = answer({"error": message}, status, **({"X-Error-Code": code} if code else {}))


def answer(data, status=200, **headers):
    """Data as JSON."""
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json", **headers})


def blob(commit, path):
    """`(git's id of a file, its LFS record or None)`: git itself stores only a pointer to an LFS file."""
    content = commit.files[path]
    sha256, lfs = hashlib.sha256(content).hexdigest(), None
    if path in commit.lfs:
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        lfs = {"oid": sha256, "sha256": sha256, "size": len(commit.files[path]), "pointerSize": len(content)}
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), lfs


class Repositories:
    """The Hub's state and, under the name of each route, its answer to a request that nothing went wrong with.

    Attributes:
        branches: repository -> branch -> commits, oldest first.
        private: the repositories that only the token's owner may read.
        announced: sha256 -> size in bytes of the LFS files that may be uploaded.
        objects: sha256 -> content of those that were.
    """

    def __init__(self, url):
        self.url = url
        self.branches = {}
        self.private = set()
        self.announced = {}
        self.objects = {}

    def append(self, commits, message, files, lfs):
        """The new last commit; its sha depends on all before it, as git's does."""
        parent = commits[-1].sha if commits else ""
        content = [(path, hashlib.sha1(files[path]).hexdigest()) for path in sorted(files)]
        sha = hashlib.sha1(json.dumps([parent, message, content]).encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        commits.append(Commit(sha, message, files, frozenset(lfs), date))
        return commits[-1]

    def branch_of(self, repo, revision):
        if revision not in self.branches[repo]:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.branches[repo][revision]

    def upto(self, repo, revision):
        """The commits up to a branch's last or up to the one with this sha."""
        for commits in self.branches[repo].values():
            for i, commit in enumerate(commits):
                if commit.sha == revision:
                    return commits[: i + 1]
        return self.branch_of(repo, revision)

    def whoami(self, request):
        return answer({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def access(self, request):
        return answer({})

    def create(self, request):
        wanted = request.json()
        if wanted.get("type", "model") != "model":
            raise HubError(400, "Only model repositories are supported")
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        url = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.branches:
            return answer({"error": "You already created this model repo", **url}, 409)
        if wanted.get("visibility") == "private":
            self.private.add(repo)
        self.branches[repo] = {"main": []}
        attributes = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
        self.append(self.branches[repo]["main"], "initial commit", {".gitattributes": attributes.encode()}, ())
        return answer(url)

    def info(self, request):
        commits = self.upto(request.repo, request.revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commits[-1].files)]
        for sibling in siblings if "blobs" in request.query else ():
            oid, lfs = blob(commits[-1], sibling["rfilename"])
            sibling |= {"size": len(commits[-1].files[sibling["rfilename"]]), "blobId": oid, "lfs": lfs}
        private = request.repo in self.private
        about = {"id": request.repo, "modelId": request.repo, "sha": commits[-1].sha, "private": private, "tags": []}
        return answer({**about, "lastModified": commits[-1].date, "createdAt": commits[0].date, "siblings": siblings})

    def tree(self, request):
        commit = self.upto(request.repo, request.revision)[-1]
        folder = f"{request.path.rstrip('/')}/" if request.path else ""
        inside = [path for path in sorted(commit.files) if path.startswith(folder)]
        if not inside:
            raise HubError(404, f"{request.path} does not exist on {request.revision}", "EntryNotFound")
        deep = request.query.get("recursive") == ["true"]
        folders = {p[:i] for p in inside for i, c in enumerate(p) if c == "/" and i >= len(folder)}
        entries = [{"type": "directory", "path": p, "oid": commit.sha} for p in sorted(folders)]
        for path in inside:
            oid, lfs = blob(commit, path)
            size = len(commit.files[path])
            entries.append({"type": "file", "path": path, "size": size, "oid": oid} | ({"lfs": lfs} if lfs else {}))
        return answer([entry for entry in entries if deep or "/" not in entry["path"][len(folder) :]])

    def history(self, request):
        commits = self.upto(request.repo, request.revision)
        rest = {"message": "", "authors": [{"user": USER}]}
        return answer([{"id": c.sha, "title": c.message, "date": c.date, **rest} for c in reversed(commits)])

    def branch(self, request):
        branches = self.branches[request.repo]
        if request.revision in branches:
            raise HubError(409, f"Reference already exists: {request.revision}")
        branches[request.revision] = list(self.upto(request.repo, request.json().get("startingPoint", "main")))
        return answer({})

    def validate_yaml(self, request):
        return answer({"errors": [], "warnings": []})

    def preupload(self, request):
        commit = self.branch_of(request.repo, request.revision)[-1]
        files = []
        for file in request.json()["files"]:
            path, oid = file["path"], None
            listed = any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            large = listed or file["size"] > 10 * 2**20 or b"\0" in base64.b64decode(file["sample"])
            if path in commit.files:
                git_oid, lfs = blob(commit, path)
                oid = lfs["oid"] if lfs else git_oid
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return answer({"files": files})

    def lfs_batch(self, request):
        objects = []
        for wanted in request.json()["objects"]:
            oid = wanted["oid"]
            if oid not in self.objects:
                self.announced[oid] = wanted["size"]
                verify = f"{self.url}/{request.repo}.git/info/lfs/objects/verify"
                wanted["actions"] = {"upload": {"href": f"{self.url}/lfs/{oid}"}, "verify": {"href": verify}}
            objects.append(wanted)
        return answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, request):
        if self.announced.get(request.oid) != len(request.body):
            raise HubError(400, f"LFS file {request.oid} was announced with {self.announced.get(request.oid)} bytes")
        if hashlib.sha256(request.body).hexdigest() != request.oid:
            raise HubError(400, f"The content of LFS file {request.oid} has another sha256")
        self.objects[request.oid] = request.body
        return Answer(200, b"", {})

    def lfs_verify(self, request):
        wanted = request.json()
        self.lfs_object(wanted["oid"], wanted["size"])
        return answer({"message": "Object is valid."})

    def lfs_object(self, oid, size):
        if len(self.objects.get(oid, b"")) != size:
            raise HubError(400, f"LFS file {oid} of {size} bytes was not uploaded")
        return self.objects[oid]

    def commit(self, request):
        commits = self.branch_of(request.repo, request.revision)
        files, lfs = dict(commits[-1].files), set(commits[-1].lfs)
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        if header["value"].get("parentCommit", commits[-1].sha) != commits[-1].sha:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                files[path] = base64.b64decode(value["content"])
                lfs.discard(path)
            elif kind == "lfsFile":
                files[path] = self.lfs_object(value["oid"], value["size"])
                lfs.add(path)
            else:
                folder = f"{path.rstrip('/')}/"
                gone = [p for p in files if (p.startswith(folder) if kind == "deletedFolder" else p == path)]
                if not gone:
                    raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for path in gone:
                    del files[path]
                    lfs.discard(path)
        made = self.append(commits, header["value"]["summary"], files, lfs)
        url = f"{self.url}/{request.repo}/commit/{made.sha}"
        return answer({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})

    def head(self, request):
        commit = self.upto(request.repo, request.revision)[-1]
        if request.path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        oid, lfs = blob(commit, request.path)
        etag = f'"{lfs["oid"] if lfs else oid}"'
        return Answer(200, commit.files[request.path], {"X-Repo-Commit": commit.sha, "ETag": etag})

    download = head
