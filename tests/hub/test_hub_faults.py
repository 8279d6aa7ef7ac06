"""Uploads and downloads that are cut, killed or late; and the Hub of this machine itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from typing import Any

import pytest

from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.layout import WEIGHTS_NAME
from tests.support.adapters import CLIENT, LOAD, ME, PUBLISH, PUBLISHED, again, assert_same, make_adapter
from tests.support.loopback_hub import Fault, LoopbackHub


class TestFaults:
    def test_an_upload_that_is_cut_once_is_sent_again(self, hub, client, folder):
        hub.faults.append(Fault("PUT", "/lfs/", cut_after=1000))
        again(lambda: client(PUBLISH, str(folder), "me/a", **ME))
        assert [seen.status for seen in hub.requests("PUT")] == [0, 200]
        assert hub.files("me/a")[WEIGHTS_NAME] == (folder / WEIGHTS_NAME).read_bytes()

    @pytest.mark.parametrize(
        "fault",
        [
            Fault("PUT", "/lfs/", times=9, status=403),
            Fault("POST", "/commit/", times=9, cut_after=100),
            Fault("POST", "/commit/", times=9, status=500),
        ],
        ids=lambda fault: f"{fault.path} {fault.status or 'cut'}",
    )
    def test_an_upload_that_fails_leaves_nothing_half_published_and_a_rerun_completes(
        self, hub, client, folder, cache, fault
    ):
        old = make_adapter(1)
        client("dtem_hf:MergeAdapter.push_to_hub", old, "me/a", **ME)
        before = hub.repos["me/a"].refs["main"]
        hub.faults.append(fault)
        with pytest.raises(OSError, match="me/a"):
            client(PUBLISH, str(folder), "me/a", **ME)
        assert hub.repos["me/a"].refs["main"] == before
        assert_same(client(LOAD, "me/a", **cache), old)
        hub.faults.clear()
        hub.seen.clear()
        client(PUBLISH, str(folder), "me/a", **ME)
        assert_same(client(LOAD, "me/a", **cache), make_adapter())
        if fault.path == "/commit/":  # what has arrived is not sent again
            assert not hub.requests("PUT")

    def test_an_upload_that_the_hub_does_not_confirm_is_tried_again(self, hub, client, folder, cache):
        hub.faults.append(Fault("POST", "/lfs-verify", times=9, status=404))
        client(PUBLISH, str(folder), "me/a", **ME)
        assert_same(client(LOAD, "me/a", **cache), make_adapter())

    def test_a_killed_upload_leaves_nothing_half_published_and_a_rerun_completes(self, hub, client, folder):
        fault = Fault("PUT", "/lfs/", delay=5.0)
        hub.faults.append(fault)
        command = (f"{CLIENT}:run_command", "push", str(folder), "me/a")
        process = client(f"{CLIENT}:start", *command, token="hf_me")
        deadline = time.monotonic() + 120
        while fault.times and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(client("os:waitpid", process, 0)[1]) == -signal.SIGKILL
        assert fault.times == 0, "the upload did not begin"
        assert hub.files("me/a") == {}
        code, out, err = client(*command, token="hf_me")
        assert code == 0, err
        assert set(hub.files("me/a")) == PUBLISHED
        assert out.strip() == f"published: {hub.endpoint}/me/a/commit/{hub.repos['me/a'].refs['main']}"

    def test_a_download_that_is_cut_is_asked_for_again(self, hub, client, cache, folder):
        client(PUBLISH, str(folder), "me/a", **ME)
        hub.faults.append(Fault("GET", "/cdn/", cut_after=1000))
        hub.seen.clear()
        assert_same(again(lambda: client(LOAD, "me/a", **cache)), make_adapter())
        assert [seen.sent for seen in hub.requests("GET", "/cdn/")] == [1000, (folder / WEIGHTS_NAME).stat().st_size]

    def test_a_hub_that_is_slow_once_is_waited_for(self, hub, client, cache, folder):
        client(PUBLISH, str(folder), "me/a", **ME)
        hub.faults.append(Fault("HEAD", CONFIG_NAME, delay=2.5))
        assert_same(client(LOAD, "me/a", **cache), make_adapter())

    def test_a_hub_that_is_down(self, hub, client, cache, folder):
        client(PUBLISH, str(folder), "me/a", **ME)
        hub.faults.append(Fault("HEAD", "/resolve/", status=503))
        assert_same(client(LOAD, "me/a", **cache), make_adapter())
        hub.faults.append(Fault("HEAD", "/resolve/", times=99, status=503))
        assert_same(client(LOAD, "me/a", **cache), make_adapter())  # from the cache
        with pytest.raises(FileNotFoundError, match=rf"me/a \(revision main\).*{hub.endpoint} cannot be reached"):
            client(LOAD, "me/a", cache_dir=cache["cache_dir"] + "2")


class TestLoopbackHub:
    """What the client does with small files does not come to."""

    def get(self, hub: LoopbackHub, path: str, **headers: str) -> tuple[int, bytes, Any]:
        request = urllib.request.Request(f"{hub.endpoint}{path}", headers=headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
                return response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def test_ranges_and_etags(self, hub):
        data = bytes(range(256)) * 4
        commit = hub.commit("me/a", {"notes.txt": data})
        status, body, headers = self.get(hub, "/me/a/resolve/main/notes.txt")
        assert (status, body, headers["X-Repo-Commit"]) == (200, data, commit)
        git = (
            subprocess.run(["git", "hash-object", "--stdin"], input=data, capture_output=True).stdout.decode().strip()
        )
        assert headers["ETag"] == f'"{git}"'
        assert self.get(hub, "/me/a/resolve/main/notes.txt", **{"If-None-Match": headers["ETag"]})[:2] == (304, b"")
        for wanted, expected in (("1000-", data[1000:]), ("3-5", data[3:6]), ("0-9999", data)):
            status, body, headers = self.get(hub, "/me/a/resolve/main/notes.txt", Range=f"bytes={wanted}")
            assert (status, body) == (206, expected) and headers["Content-Range"].endswith("/1024")
        assert self.get(hub, "/me/a/resolve/main/notes.txt", Range="bytes=1024-")[0] == 416

    def test_what_it_refuses(self, hub):
        hub.create("me/secret", private=True)
        assert self.get(hub, "/api/models/me/secret")[0] == 401
        status, _, headers = self.get(hub, "/api/models/me/secret", Authorization="Bearer hf_other")
        assert (status, headers["X-Error-Code"]) == (404, "RepoNotFound")
        assert self.get(hub, "/api/models/me/secret", Authorization="Bearer hf_reader")[0] == 200
        assert self.get(hub, "/api/whoami-v2", Authorization="Bearer hf_nonsense")[0] == 401
        assert json.loads(self.get(hub, "/api/whoami-v2", Authorization="Bearer hf_me")[1])["name"] == "me"
        assert self.get(hub, "/me/a/resolve/main/x")[2]["X-Error-Code"] == "RepoNotFound"
