"""The routes of the loopback Hub, as huggingface_hub's client calls them, and what they refuse."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import yaml

from tests.support.loopback_answers import Answering, Refused


if TYPE_CHECKING:
    from tests.support.loopback_hub import Repo

LFS_SUFFIXES = (".bin", ".png", ".safetensors")
ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
CREATED = "2025-01-01T00:00:00.000Z"


class Handler(Answering):
    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("GET", rf"/api/models/{ID}", "info"),
        ("GET", rf"/api/models/{ID}/revision/(?P<rev>[^/]+)", "info"),
        ("GET", rf"/api/models/{ID}/refs", "refs"),
        ("POST", rf"/api/models/{ID}/branch/(?P<name>[^/]+)", "make_branch"),
        ("POST", rf"/api/models/{ID}/tag/(?P<rev>[^/]+)", "make_tag"),
        ("GET", rf"/api/models/{ID}/tree/(?P<rev>[^/]+)(/(?P<under>.*))?", "tree"),
        ("POST", rf"/api/models/{ID}/paths-info/(?P<rev>[^/]+)", "paths_info"),
        ("POST", rf"/api/models/{ID}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{ID}/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs-verify", "lfs_verify"),
        ("GET HEAD", rf"/{ID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET HEAD", r"/cdn/(?P<oid>[0-9a-f]{64})", "from_cdn"),
    )

    # Who may see and change what

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        owner = self.user is not None and repo_id.split("/")[0] == self.user.name
        if repo is None or (repo.private and not owner):
            if self.user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        if write:
            self._check_may_write(owner)
        return repo

    def _check_may_write(self, owner: bool) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        if not self.user.can_write:
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository")
        if not owner:
            raise Refused(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")

    def _check_gate(self, repo_id: str, repo: Repo) -> None:
        if repo.gated_for is None or (self.user is not None and self.user.name in repo.gated_for):
            return
        message = f"Access to model {repo_id} is restricted. Visit {self.hub.endpoint}/{repo_id} to ask for access."
        raise Refused(401 if self.user is None else 403, message, "GatedRepo")

    def _at(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # Accounts and repositories

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        role = "write" if self.user.can_write else "read"
        token = {"accessToken": {"displayName": "a token", "role": role}, "type": "access_token"}
        self._json({"type": "user", "name": self.user.name, "fullname": "", "orgs": [], "auth": token})

    def validate_yaml(self) -> None:
        errors = [{"message": message} for message in metadata_errors(json.loads(self.body)["content"])]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        owner = wanted.get("organization") or self.user.name
        repo_id = f"{owner}/{wanted['name']}"
        self._check_may_write(owner == self.user.name)
        url = f"{self.hub.endpoint}/{repo_id}"
        with self.hub.lock:
            if repo_id in self.hub.repos:
                self._json({"error": "You already created this model repo", "url": url}, 409)
                return
            private = wanted.get("private") is True or wanted.get("visibility") == "private"
            self.hub.create(repo_id, private=private)
        self._json({"url": url, "name": repo_id, "id": repo_id})

    def info(self, repo: str, rev: str = "main") -> None:
        found = self._repo(repo)
        sha = self._at(found, rev)
        files = found.commits[sha].files
        card = files.get("README.md")
        self._json(
            {
                **{"_id": "0", "id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": sha, "tags": []},
                **{"private": found.private, "gated": found.gated_for is not None and "auto", "disabled": False},
                **{"downloads": 0, "likes": 0, "createdAt": CREATED, "lastModified": CREATED},
                "siblings": [{"rfilename": path} for path in sorted(files)],
                "cardData": None if card is None else card_metadata(card.decode()),
            }
        )

    def refs(self, repo: str) -> None:
        found = self._repo(repo)
        listed = [
            {"name": name, "ref": name if name.startswith("refs/") else f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in found.refs.items()
        ]
        tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in found.tags.items()]
        pulls = [ref for ref in listed if ref["ref"].startswith("refs/pr/")]
        branches = [ref for ref in listed if ref not in pulls]
        self._json({"branches": branches, "tags": tags, "converts": [], "pullRequests": pulls})

    def make_branch(self, repo: str, name: str) -> None:
        found = self._repo(repo, write=True)
        if name.startswith("refs/"):
            raise Refused(400, f"Invalid reference for a branch: {name}")
        if name in found.refs:
            raise Refused(409, f"Reference already exists: {name}")
        found.refs[name] = self._at(found, json.loads(self.body or b"{}").get("startingPoint", "main"))
        self._json({})

    def make_tag(self, repo: str, rev: str) -> None:
        found = self._repo(repo, write=True)
        found.tags[json.loads(self.body)["tag"]] = self._at(found, rev)
        self._json({})

    def tree(self, repo: str, rev: str, under: str) -> None:
        found = self._repo(repo)
        files = found.commits[self._at(found, rev)].files
        self._json([describe(path, data) for path, data in sorted(files.items()) if path.startswith(under)])

    def paths_info(self, repo: str, rev: str) -> None:
        found = self._repo(repo)
        files = found.commits[self._at(found, rev)].files
        wanted = parse_qs(self.body.decode())["paths"]
        self._json([describe(path, files[path]) for path in wanted if path in files])

    # Uploads

    def preupload(self, repo: str, rev: str) -> None:
        pull = "create_pr" in self.query
        found = self._repo(repo, write=not pull)
        files = found.commits[self._at(found, rev)].files
        answers = []
        for wanted in json.loads(self.body)["files"]:
            path = wanted["path"]
            lfs = path.endswith(LFS_SUFFIXES)
            oid = describe(path, files[path])["oid"] if path in files else None
            oid = hashlib.sha256(files[path]).hexdigest() if lfs and path in files else oid
            mode = "lfs" if lfs else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self._repo(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs-verify"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "the content is not that of the object")
        self.hub.objects[oid] = self.body
        self._send(200, b"", {})

    def lfs_verify(self) -> None:
        wanted = json.loads(self.body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refused(404, "no such object")
        self._json({})

    def commit(self, repo: str, rev: str) -> None:
        pull = "create_pr" in self.query
        if self.hub.on_commit is not None:
            self.hub.on_commit(repo)
        found = self._repo(repo, write=not pull)
        if pull and (self.user is None or not self.user.can_write):
            self._check_may_write(False)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        with self.hub.lock:
            head = self._at(found, rev)
            if header.get("parentCommit") not in (None, head):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(found.commits[head].files)
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            sha = found.add(f"refs/pr/{number}" if pull else rev, files, header["summary"], head)
        url = f"{self.hub.endpoint}/{repo}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        self._json({**answer, **({"pullRequestUrl": f"{url}/discussions/{number}"} if pull else {})})

    def _apply(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise Refused(400, f"LFS pointer of {path} points to a file that does not exist")
            files[path] = self.hub.objects[value["oid"]]
        elif key == "deletedFile":
            del files[path]
        else:
            raise Refused(400, f"the loopback Hub does not know {key}")
        if path == "README.md" and key == "file" and (errors := metadata_errors(files[path].decode())):
            raise Refused(400, "; ".join(errors))

    # Downloads

    def resolve(self, repo: str, rev: str, path: str) -> None:
        found = self._repo(repo)
        self._check_gate(repo, found)
        sha = self._at(found, rev)
        data = found.commits[sha].files.get(path)
        if data is None:
            raise Refused(404, f"Entry not found: {path}", "EntryNotFound", **{"X-Repo-Commit": sha})
        entry = describe(path, data)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{entry["oid"]}"'}
        if "lfs" not in entry:
            self._send_part(data, headers)
            return
        oid = entry["lfs"]["oid"]
        self.hub.objects[oid] = data
        linked = {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data)), "Location": f"{self.hub.cdn}/{oid}"}
        self._send(302, b"", {**headers, **linked})

    def from_cdn(self, oid: str) -> None:
        if oid not in self.hub.objects:
            raise Refused(404, "no such object")
        self._send_part(self.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _send_part(self, data: bytes, headers: dict[str, str]) -> None:
        if self.headers.get("If-None-Match") == headers["ETag"]:
            self._send(304, b"", headers)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, data, headers)
            return
        first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        if first >= len(data):
            raise Refused(416, "the range is behind the end", **{"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], headers)


def describe(path: str, data: bytes) -> dict[str, Any]:
    """A file as the tree lists it: git's hash of the blob, which for LFS is that of its pointer."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    blob = data
    if path.endswith(LFS_SUFFIXES):
        oid = hashlib.sha256(data).hexdigest()
        blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": len(blob)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
    return entry


def card_metadata(text: str) -> Any:
    """The YAML block in front of a card; None where there is none."""
    found = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", text, re.DOTALL)
    return None if found is None else yaml.safe_load(found[1])


def metadata_errors(text: str) -> list[str]:
    """What the Hub would refuse in a card's metadata."""
    try:
        values = card_metadata(text)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"]
    if values is None:
        return []
    if not isinstance(values, dict):
        return ["YAML Metadata Error: not an object"]
    errors = []
    lists = ("tags", "datasets", "metrics")
    errors += [f'"{key}" must be an array' for key in lists if not isinstance(values.get(key, []), list)]
    names = [*(values.get("datasets") or ()), *([values["base_model"]] if "base_model" in values else [])]
    errors += [f"{name!r} is no Hub id" for name in names if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name))]
    if values.get("base_model_relation") not in (None, "adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
    if "license" in values and not re.fullmatch(r"[a-z0-9.-]+", str(values["license"])):
        errors.append('"license" is unknown')
    for entry in values.get("model-index") or ():
        for result in entry["results"]:
            needed = (result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name"))
            complete = all(needed) and all("type" in m and "value" in m for m in result["metrics"])
            errors += [] if complete and entry["name"] else ['"model-index" lacks a name, type or value']
    return errors
