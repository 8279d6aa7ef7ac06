"""Answers that a Hub should not give: lost, empty, HTML, without length, of other bytes. The real client against a
server on this machine: every failure names the repository, and none says more than the Hub knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtem_hf import AdapterError
from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.layout import WEIGHTS_NAME
from tests.support.adapters import LOAD, ME, PUBLISH, assert_same, make_adapter
from tests.support.loopback_hub import Fault


HTML = b"<html><body>Please log in to the hotel's network</body></html>"
NOT_JSON = [b"", HTML]


@pytest.fixture
def published(hub: Any, folder: Path) -> dict[str, bytes]:
    """The files of me/a, which holds the adapter."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.commit("me/a", files)
    return files


def message_of(error: Any) -> str:
    text = str(error.value)
    assert "me/a" in text and len(text.splitlines()) == 1
    return text


class TestPush:
    @pytest.mark.parametrize("body", [*NOT_JSON, b"{}", b"[]", b"null", b'{"files": 3}'])
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/api/models/me/a/revision/"),
            ("POST", "/api/repos/create"),
            ("POST", "/api/validate-yaml"),
            ("POST", "/preupload/"),
            ("POST", "/objects/batch"),
            ("POST", "/commit/"),
        ],
    )
    def test_what_is_no_answer_of_the_hub_is_an_error_that_names_the_repository(
        self, hub, client, folder, method, path, body
    ):
        """Where the client looks only at the status, all files must be there."""
        fault = Fault(method, path, times=9, body=body)
        hub.faults.append(fault)
        try:
            client(PUBLISH, str(folder), "me/a", **ME)
        except OSError as error:
            assert "me/a" in str(error) and len(str(error).splitlines()) == 1
            assert "me/a" not in hub.repos or hub.files("me/a") == {}
        else:
            assert hub.files("me/a")[WEIGHTS_NAME] == (folder / WEIGHTS_NAME).read_bytes()
        assert fault.times < 9
        hub.faults.clear()
        client(PUBLISH, str(folder), "me/a", **ME)
        assert hub.files("me/a")[WEIGHTS_NAME] == (folder / WEIGHTS_NAME).read_bytes()

    @pytest.mark.parametrize("body", NOT_JSON)
    def test_a_repository_without_a_user_that_the_hub_did_not_name(self, hub, client, folder, body):
        hub.faults.append(Fault("POST", "/api/repos/create", times=9, body=body))
        with pytest.raises(ConnectionError, match=r"mine: .*Nothing was published"):
            client(PUBLISH, str(folder), "mine", **ME)

    @pytest.mark.parametrize("body", NOT_JSON)
    def test_a_branch_that_the_hub_did_not_make(self, hub, client, folder, body):
        hub.faults.append(Fault("POST", "/branch/", times=9, body=body))
        with pytest.raises(ConnectionError) as error:
            client(PUBLISH, str(folder), "me/a", branch="dev", **ME)
        assert "made no branch 'dev'" in message_of(error) and "Nothing was published" in str(error.value)

    @pytest.mark.parametrize(
        "lost",
        [{"body": HTML}, {"body": b""}, {"body": b"{}"}, {"body": b"bad gateway", "status": 502}, {}],
        ids=["HTML", "nothing", "empty", "502", "cut"],
    )
    def test_a_commit_whose_answer_is_lost_is_not_made_twice(self, hub, client, folder, cache, lost):
        make_adapter(1).save_pretrained(folder)
        hub.commit("me/a", {"notes.txt": b"before"})
        hub.faults.append(Fault("POST", "/commit/", carried_out=True, **lost))
        commit = client(PUBLISH, str(folder), "me/a", **ME)
        assert commit.oid == hub.repos["me/a"].refs["main"]
        assert len(hub.repos["me/a"].commits) == 3  # the first, the notes, and one of the adapter
        assert_same(client(LOAD, "me/a", **cache), make_adapter(1))

    def test_a_commit_that_is_cut_once_is_made_again(self, hub, client, folder, cache):
        hub.commit("me/a", {"notes.txt": b"before"})
        hub.faults.append(Fault("POST", "/commit/", cut_after=10))
        client(PUBLISH, str(folder), "me/a", **ME)
        assert len(hub.repos["me/a"].commits) == 3
        assert_same(client(LOAD, "me/a", **cache), make_adapter())

    def test_where_the_hub_does_not_say_whether_it_arrived_no_claim_is_made(self, hub, client, folder):
        hub.commit("me/a", {"notes.txt": b"before"})
        hub.faults.append(Fault("POST", "/commit/", times=9, body=HTML))
        with pytest.raises(ConnectionError) as error:
            client(PUBLISH, str(folder), "me/a", **ME)
        said = message_of(error)
        assert "Nothing was published" not in said and "does not say whether" in said and "same command again" in said
        hub.faults.clear()
        client(PUBLISH, str(folder), "me/a", **ME)
        assert len(hub.repos["me/a"].commits) == 3

    @pytest.mark.parametrize("carried_out", [False, True])
    def test_a_lost_pull_request_is_to_be_looked_for(self, hub, client, folder, carried_out):
        """A second one would be made by the same command."""
        hub.commit("me/a", {"notes.txt": b"before"})
        hub.faults.append(Fault("POST", "/commit/", body=HTML, carried_out=carried_out))
        with pytest.raises(ConnectionError) as error:
            client(PUBLISH, str(folder), "me/a", create_pr=True, **ME)
        said = message_of(error)
        assert f"Look at {hub.endpoint}/me/a/discussions" in said and "Nothing was published" not in said
        assert hub.repos["me/a"].refs.keys() >= ({"refs/pr/1"} if carried_out else {"main"})
        assert len(hub.requests("POST", "/commit/")) == 1

    def test_metadata_that_the_hub_refuses(self, hub, client, folder):
        (folder / "README.md").write_text("---\nlicense: my very own\n---\n# A card\n")
        with pytest.raises(OSError) as error:
            client(PUBLISH, str(folder), "me/a", **ME)
        assert "README.md" in message_of(error) and "license" in str(error.value)

    def test_the_command_says_it_in_one_line(self, hub, client, folder):
        hub.faults.append(Fault("POST", "/api/validate-yaml", times=9, body=HTML))
        code, out, err = client("tests.support.hub_client:run_command", "push", str(folder), "me/a", token="hf_me")
        assert (code, out) == (1, "") and len(err.splitlines()) == 1 and "me/a" in err


class TestLoad:
    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
    def test_wrong_bytes_of_the_right_length_are_refused_and_not_kept(self, hub, client, cache, published, name):
        place = name if name == CONFIG_NAME else "/cdn/"
        wrong = published[name].replace(b'"r": 2', b'"r": 2,', 1)[: len(published[name])]
        wrong = wrong if name == CONFIG_NAME else published[name][:-4] + b"\x00\x00\x80?"
        assert len(wrong) == len(published[name]) and wrong != published[name]
        hub.faults.append(Fault("GET", place, body=wrong))
        with pytest.raises(AdapterError, match=f"me/a: .*{name}"):
            client(LOAD, "me/a", **cache)
        assert_same(client(LOAD, "me/a", **cache), make_adapter())

    def test_what_was_damaged_in_the_cache_is_dropped(self, hub, client, cache, published):
        client(LOAD, "me/a", **cache)
        (snapshot,) = Path(cache["cache_dir"]).glob(f"*/snapshots/*/{WEIGHTS_NAME}")
        blob = snapshot.resolve()
        blob.write_bytes(published[WEIGHTS_NAME][:-4] + b"\x00\x00\x80?")
        with pytest.raises(AdapterError, match="SHA-256"):
            client(LOAD, "me/a", local_files_only=True, **cache)
        assert not blob.exists() and not snapshot.is_symlink()
        assert_same(client(LOAD, "me/a", **cache), make_adapter())

    def test_an_adapter_without_a_digest_still_loads(self, hub, client, cache, published):
        config = json.loads(published[CONFIG_NAME])
        del config["tensors_sha256"]
        hub.commit("me/a", {CONFIG_NAME: json.dumps(config).encode()})
        assert_same(client(LOAD, "me/a", **cache), make_adapter())

    @pytest.mark.parametrize("place", [CONFIG_NAME, "/cdn/"])
    def test_a_body_without_a_length_is_cut_at_the_bound(self, hub, client, cache, published, place):
        fault = Fault("GET", place, times=9, endless=True)
        hub.faults.append(fault)
        with pytest.raises(AdapterError, match=r"me/a: .* at most.*nothing was kept"):
            client(LOAD, "me/a", **cache)
        assert fault.times == 8
        (seen,) = hub.requests("GET", place)
        assert seen.sent < 64 << 20  # what the operating system's buffers and the client's chunk take
        assert not [
            path for path in Path(cache["cache_dir"]).rglob("*") if path.is_file() and path.stat().st_size > 1 << 20
        ]
        hub.faults.clear()
        assert_same(client(LOAD, "me/a", **cache), make_adapter())

    @pytest.mark.parametrize("etag", ['"../../../outside"', '"{}/outside"', '".."'])
    def test_an_etag_is_no_path(self, hub, client, cache, published, etag, tmp_path):
        hub.faults.append(Fault("HEAD", CONFIG_NAME, times=9, headers={"ETag": etag.format(tmp_path)}))
        before = set(tmp_path.rglob("*"))
        with pytest.raises(AdapterError, match=rf"me/a: .*{CONFIG_NAME}.*nothing was downloaded"):
            client(LOAD, "me/a", **cache)
        assert set(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("commit", ["../../../../outside", "", "x" * 300])
    def test_a_bad_commit_names_the_repository(self, hub, client, cache, published, commit):
        hub.faults.append(Fault("HEAD", CONFIG_NAME, times=9, headers={"X-Repo-Commit": commit}))
        with pytest.raises(OSError) as error:
            client(LOAD, "me/a", **cache)
        message_of(error)

    @pytest.mark.parametrize("revision", ["../../outside", "a/../../b", "/etc"])
    def test_a_revision_is_no_path(self, hub, client, cache, published, revision):
        with pytest.raises(FileNotFoundError, match="me/a has no revision"):
            client(LOAD, "me/a", revision=revision, **cache)
        assert hub.seen == []

    def test_a_body_of_another_length_names_the_repository(self, hub, client, cache, published):
        hub.faults.append(Fault("GET", CONFIG_NAME, times=9, body=b"{}"))
        with pytest.raises(OSError) as error:
            client(LOAD, "me/a", **cache)
        assert "Consistency check" in message_of(error)

    @pytest.mark.parametrize("status", [401, 403])
    def test_a_refusal_without_a_word_is_a_refusal(self, hub, client, cache, published, status):
        hub.faults.append(Fault("HEAD", CONFIG_NAME, times=9, status=status, body=b""))
        with pytest.raises(PermissionError) as error:
            client(LOAD, "me/a", **cache)
        assert "cannot be reached" not in message_of(error)

    @pytest.mark.parametrize("body", NOT_JSON)
    def test_a_head_without_the_hub_s_headers(self, hub, client, cache, published, body):
        hub.faults.append(Fault("HEAD", CONFIG_NAME, times=9, body=body))
        with pytest.raises(OSError) as error:
            client(LOAD, "me/a", **cache)
        assert "cannot be reached" not in message_of(error)

    def test_a_full_disk_names_the_cache(self, hub, client, cache, published):
        """By a limit on the size of files, which gives the same kind of error."""
        with pytest.raises(OSError) as error:
            client("tests.support.hub_client:with_small_files", LOAD, "me/a", **cache)
        assert cache["cache_dir"] in message_of(error)
