"""A Hub on this machine, for huggingface_hub's real client: repositories with commits, branches, tags and pull
requests, private and gated ones, tokens, LFS, and faults on demand. It keeps everything in memory.

    with LoopbackHub() as hub:  # then HF_ENDPOINT=hub.endpoint in the environment of the client's process
        hub.commit("me/adapter", {"README.md": b"..."})

    python -m tests.support.loopback_hub --port 8008
    HF_ENDPOINT=http://127.0.0.1:8008 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_me hf upload me/adapter path/to/adapter .
"""

from __future__ import annotations

import argparse
import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from tests.support.loopback_answers import Seen
from tests.support.loopback_routes import LFS_SUFFIXES, Handler


@dataclass
class Commit:
    """All files at one point, and the commit before it."""

    files: dict[str, bytes]
    parent: str | None
    message: str


@dataclass
class Repo:
    """`refs` are branches and pull requests by name, "main" and "refs/pr/1"; tags do not move."""

    private: bool = False
    gated_for: set[str] | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, ref: str, files: dict[str, bytes], message: str, parent: str | None) -> str:
        """Put a commit on a ref, and return its hash."""
        content = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())]
        sha = hashlib.sha1(repr((parent, message, len(self.commits), content)).encode()).hexdigest()
        self.commits[sha] = Commit(files, parent, message)
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, tag, pull request or hash."""
        known = {**{sha: sha for sha in self.commits}, **self.tags, **self.refs}
        return known.get(revision.removeprefix("refs/heads/"))


@dataclass
class User:
    """The owner of a token."""

    name: str
    can_write: bool = True


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match: a status, a delay, a connection cut after bytes.

    `body` is answered in place of what the Hub would say, and `headers` in place of its own. With `carried_out`, the
    Hub does what was asked, and its answer is lost. An `endless` body has no length and does not end.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    delay: float = 0.0
    cut_after: int | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    carried_out: bool = False
    endless: bool = False


class LoopbackHub:
    """Starts with `with`, stops at its end. `seen` lists the requests; `faults` is what is to go wrong."""

    def __init__(self, port: int = 0) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.users = {"hf_me": User("me"), "hf_reader": User("me", can_write=False), "hf_other": User("other")}
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.on_commit: Callable[[str], None] | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        # Another host than the Hub's, as a CDN is: the client must not send its token there.
        self.cdn = f"http://localhost:{self.port}/cdn"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def clear(self) -> None:
        """Forget everything."""
        for kept in (self.repos, self.objects, self.faults, self.seen):
            kept.clear()
        self.on_commit = None

    def create(self, repo_id: str, private: bool = False, gated_for: set[str] | None = None) -> Repo:
        """A repository as the Hub makes it: one commit with `.gitattributes`."""
        repo = self.repos[repo_id] = Repo(private, gated_for)
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        repo.add("main", {".gitattributes": rules.encode()}, "initial commit", None)
        return repo

    def commit(self, repo_id: str, files: dict[str, bytes], ref: str = "main", **options: Any) -> str:
        """Add files behind the client's back, in a repository that is made if need be."""
        repo = self.repos.get(repo_id) or self.create(repo_id, **options)
        parent = repo.refs.get(ref, repo.refs["main"])
        return repo.add(ref, {**repo.commits[parent].files, **files}, "behind the client's back", parent)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a revision, without `.gitattributes`."""
        repo = self.repos[repo_id]
        files = repo.commits[repo.resolve(revision) or ""].files
        return {path: data for path, data in files.items() if path != ".gitattributes"}

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def requests(self, method: str, pattern: str = "") -> list[Seen]:
        """The requests of a method whose path matches."""
        with self.lock:
            return [seen for seen in self.seen if seen.method == method and re.search(pattern, seen.path)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8008)
    with LoopbackHub(parser.parse_args().port) as running:
        print(f"HF_ENDPOINT={running.endpoint}; tokens: {', '.join(running.users)}", flush=True)
        threading.Event().wait()
