"""Adapters on a Hub: the real client, in a process of its own, against a server on this machine."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from packaging.version import Version
from PIL import Image

from dtem_hf import AdapterError, AutoModelForImageClassification, BadValue, DTEMConfig, MergeAdapter
from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.facts import BackboneFacts
from dtem_hf.hub.layout import WEIGHTS_NAME
from tests.support.hub_client import hub_environment
from tests.support.loopback_hub import Fault, LoopbackHub


CLIENT = "tests.support.hub_client"
LOAD = "dtem_hf:MergeAdapter.from_pretrained"
PUBLISH = "dtem_hf.hub.publishing:publish_folder"
ME = {"token": "hf_me"}
PUBLISHED = {"README.md", "config.json", CONFIG_NAME, WEIGHTS_NAME}


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    """A cache in which nothing is yet."""
    return {"cache_dir": str(tmp_path / "cache")}


def make_adapter(seed: int = 0, **facts: Any) -> MergeAdapter:
    """An adapter for the backbone in `vit_folder`, of about 9 kB."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(16, 32, generator=draw) for i in range(4)}
    tensors |= {f"layers.{i}.bias": torch.randn(16, generator=draw) for i in range(4)}
    backbone = BackboneFacts(**{"model_type": "vit", "num_layers": 4, "hidden_size": 32, **facts})
    return MergeAdapter(DTEMConfig(r=2), tensors, backbone)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_adapter().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def assert_same(first: MergeAdapter, second: MergeAdapter) -> None:
    assert first.config == second.config and first.backbone == second.backbone
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def again(attempt: Callable[[], Any]) -> Any:
    """Newer clients try again by themselves where a connection was cut, older ones say what to do."""
    try:
        return attempt()
    except ConnectionError as error:
        assert "me/a: the connection to" in str(error) and "again" in str(error)
        return attempt()


class TestRoundTrip:
    def test_every_way_to_name_a_revision_gives_the_bits_that_were_pushed_to_it(self, hub, client, cache):
        first, second, third, fourth = (make_adapter(seed) for seed in range(4))
        commit = client("dtem_hf:MergeAdapter.push_to_hub", first, "me/a", commit_message="One", **ME)
        client("huggingface_hub:create_tag", "me/a", tag="v1", **ME)
        client("dtem_hf:MergeAdapter.push_to_hub", second, "me/a", **ME)
        client("dtem_hf:MergeAdapter.push_to_hub", third, "me/a", branch="wide/er", **ME)
        proposed = client("dtem_hf:MergeAdapter.push_to_hub", fourth, "me/a", create_pr=True, **ME)

        assert proposed.pr_revision == "refs/pr/1"
        expected = {commit.oid: first, "v1": first, "main": second, "wide/er": third, "refs/pr/1": fourth}
        for revision, adapter in expected.items():
            assert_same(client(LOAD, "me/a", revision=revision, **cache), adapter)
            assert_same(client("dtem_hf:MergeAdapter.from_reference", f"me/a@{revision}", **cache), adapter)
        assert_same(client(LOAD, "me/a", **cache), second)
        assert hub.repos["me/a"].commits[commit.oid].message == "One"
        assert set(hub.files("me/a")) == PUBLISHED

    def test_one_push_is_one_commit_and_the_same_again_is_none(self, hub, client, folder):
        client(PUBLISH, str(folder), "me/a", **ME)
        assert len(hub.repos["me/a"].commits) == 2
        again = client(PUBLISH, str(folder), "me/a", **ME)
        assert len(hub.repos["me/a"].commits) == 2 and again.oid == hub.repos["me/a"].refs["main"]

    def test_revision_means_branch_and_may_not_contradict_it(self, hub, client, folder):
        client(PUBLISH, str(folder), "me/a", revision="next", **ME)
        assert set(hub.files("me/a", "next")) == PUBLISHED and hub.files("me/a") == {}
        with pytest.raises(BadValue, match=r"revision='b'.*branch='a'"):
            client(PUBLISH, str(folder), "me/a", branch="a", revision="b", **ME)
        with pytest.raises(BadValue, match=r"branch='next'.*create_pr"):
            client(PUBLISH, str(folder), "me/a", branch="next", create_pr=True, **ME)

    def test_a_name_without_a_user_is_ones_own(self, hub, client, folder):
        client(PUBLISH, str(folder), "mine", **ME)
        assert set(hub.files("me/mine")) == PUBLISHED

    def test_saving_with_push_to_hub(self, hub, client, tmp_path):
        save = "dtem_hf:MergeAdapter.save_pretrained"
        client(save, make_adapter(3), str(tmp_path / "saved"), push_to_hub=True, repo_id="me/saved", **ME)
        assert hub.files("me/saved")[WEIGHTS_NAME] == (tmp_path / "saved" / WEIGHTS_NAME).read_bytes()

    def test_merge_takes_an_id_with_a_revision(self, hub, client, cache, vit_folder, tmp_path):
        """Through our Auto classes and transformers' own, for a private repository; against the folder on disk."""
        pixels = torch.randn(2, 3, 32, 32)
        for seed, tag in ((1, "v1"), (2, "v2")):
            client("dtem_hf:MergeAdapter.push_to_hub", make_adapter(seed), "me/a", private=True, **ME)
            client("huggingface_hub:create_tag", "me/a", tag=tag, **ME)
        for seed, reference in ((1, "me/a@v1"), (2, "me/a@v2"), (2, "me/a")):
            make_adapter(seed).save_pretrained(tmp_path / str(seed))
            model = AutoModelForImageClassification.from_pretrained(vit_folder, merge=tmp_path / str(seed))
            with torch.inference_mode():
                expected = model(pixels).logits
            for registered in (False, True):
                options = {"registered": registered, "merge": reference, **ME, **cache}
                assert torch.equal(client(f"{CLIENT}:logits", str(vit_folder), pixels, **options), expected)

    @pytest.mark.parametrize(
        ("merge", "message"),
        [
            ("tome", r"merge='tome': for this method, write ToMeConfig\(\)"),
            ("DTEM", r"merge='DTEM': for this method, write DTEMConfig\(\)"),
            ("my-adapter", r"merge='my-adapter': a folder that is there, a Hub id \(user/repo\)"),
            (8, r"merge=8: a config such as ToMeConfig\(r=8\)"),
        ],
    )
    def test_names_and_numbers_are_refused_before_the_hub_is_asked(self, hub, client, vit_folder, merge, message):
        hub.commit("me/base", {path.name: path.read_bytes() for path in vit_folder.iterdir()})
        hub.seen.clear()
        with pytest.raises(BadValue, match=message):
            client("dtem_hf:AutoModelForImageClassification.from_pretrained", "me/base", merge=merge)
        assert hub.seen == []

    def test_a_model_pushes_its_adapter_and_its_backbone_is_never_touched_by_reading_it(
        self, hub, client, vit_folder, cache
    ):
        weights = {path.name: path.read_bytes() for path in vit_folder.iterdir()}
        revision = hub.commit("me/base", weights)
        assert client(f"{CLIENT}:push_merged", "me/base", "me/a", **ME) == revision
        hub.seen.clear()
        adapter = client(LOAD, "me/a", **cache)
        assert (adapter.backbone.base_model, adapter.backbone.base_revision) == ("me/base", revision)
        assert not [seen for seen in hub.seen if "me/base" in seen.path]

        warned = (
            f"{CLIENT}:warned",
            "dtem_hf:AutoModelForImageClassification.from_pretrained",
            "me/base",
        )
        assert not [text for text in client(*warned, merge="me/a") if "base_revision" in text]
        hub.commit("me/base", {"notes.txt": b"another commit"})
        assert [text for text in client(*warned, merge="me/a") if f"trained for '{revision}'" in text]
        assert not [text for text in client(*warned, merge="me/a", revision=revision) if "base_revision" in text]


class TestCache:
    def test_what_is_in_the_cache_is_asked_for_and_not_sent_again(self, hub, client, cache, folder):
        client(PUBLISH, str(folder), "me/a", **ME)
        hub.seen.clear()
        client(LOAD, "me/a", **cache)
        assert len(hub.requests("GET", CONFIG_NAME)) == len(hub.requests("GET", "/cdn/")) == 1
        hub.seen.clear()
        assert_same(client(LOAD, "me/a", **cache), make_adapter())
        assert {seen.method for seen in hub.seen} == {"HEAD"} and sum(seen.sent for seen in hub.seen) == 0
        client(LOAD, "me/a", force_download=True, **cache)
        assert len(hub.requests("GET", "/cdn/")) == 1

    def test_only_what_has_changed_is_sent(self, hub, client, cache, folder):
        client(PUBLISH, str(folder), "me/a", **ME)
        client(LOAD, "me/a", **cache)
        changed = json.loads((folder / CONFIG_NAME).read_text()) | {"r": 3}
        hub.commit("me/a", {CONFIG_NAME: json.dumps(changed).encode()})
        hub.seen.clear()
        assert client(LOAD, "me/a", **cache).config.r == 3
        assert hub.requests("GET", CONFIG_NAME) and not hub.requests("GET", "/cdn/")

    def test_config_and_tensors_are_of_one_commit_whatever_is_pushed_in_between(self, hub, client, cache, folder):
        """A push after the config was read: its tensors would be another adapter's."""
        client(PUBLISH, str(folder), "me/a", **ME)
        client(LOAD, "me/a", **cache)
        heads = [seen.path for seen in hub.requests("HEAD", WEIGHTS_NAME)]
        assert heads and all(f"/resolve/{hub.repos['me/a'].refs['main']}/" in path for path in heads)

    def test_offline_afterwards(self, hub, client, folder, tmp_path):
        client(PUBLISH, str(folder), "me/a", **ME)
        client("huggingface_hub:create_tag", "me/a", tag="v1", **ME)
        home = tmp_path / "home"
        for revision in (None, "v1"):
            client(LOAD, "me/a", revision=revision, cache_dir=str(home / "hub"))
        hub.seen.clear()
        local = {"cache_dir": str(home / "hub"), "local_files_only": True}
        assert_same(client(LOAD, "me/a", **local), make_adapter())
        script = (
            "from dtem_hf import MergeAdapter as A\n"
            "print(A.from_reference('me/a@v1').config.r, A.from_reference('me/a').embed_dim)\n"
            "try: A.from_pretrained('me/b')\n"
            "except FileNotFoundError as error: print(error)\n"
        )
        environment = {**hub_environment(hub.endpoint, home), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert first == "2 16"
        assert "me/b" in second and "offline" in second and "load it once" in second
        assert hub.seen == []


class TestWhoMay:
    def test_a_private_adapter(self, hub, client, cache, folder):
        client(PUBLISH, str(folder), "me/secret", private=True, **ME)
        assert hub.repos["me/secret"].private
        assert_same(client(LOAD, "me/secret", **ME, cache_dir=cache["cache_dir"] + "2"), make_adapter())
        with pytest.raises(FileNotFoundError, match=r"me/secret.*private, log in with `hf auth login`"):
            client(LOAD, "me/secret", **cache)
        with pytest.raises(FileNotFoundError, match="me/secret"):
            client(LOAD, "me/secret", token="hf_other", **cache)
        with pytest.raises(PermissionError, match=r"does not accept your token for me/secret: log in"):
            client(LOAD, "me/secret", token="hf_nonsense", **cache)

    def test_a_gated_adapter(self, hub, client, cache, folder):
        hub.commit("me/gated", {path.name: path.read_bytes() for path in folder.iterdir()}, gated_for={"me"})
        assert_same(client(LOAD, "me/gated", **ME, cache_dir=cache["cache_dir"] + "2"), make_adapter())
        for token in (None, "hf_other"):
            with pytest.raises(
                PermissionError, match=rf"me/gated is gated: ask for access at {hub.endpoint}/me/gated"
            ):
                client(LOAD, "me/gated", token=token, **cache)

    @pytest.mark.parametrize(
        ("reference", "message"),
        [
            ("me/nothing", r"no repository me/nothing on .*Check the name"),
            ("me/a@v9", r"me/a has no revision 'v9': name a branch, a tag, or a commit"),
            ("me/empty", r"no merge_config\.json in me/empty \(revision main\), so it is no merge adapter"),
            ("me/half@main", r"no merge_adapter\.safetensors in me/half"),
            ("me/a/b", r"'me/a/b' is neither a folder here nor a Hub id"),
        ],
    )
    def test_what_is_not_there(self, hub, client, cache, folder, reference, message):
        hub.commit("me/a", {path.name: path.read_bytes() for path in folder.iterdir()})
        hub.create("me/empty")
        hub.commit("me/half", {CONFIG_NAME: (folder / CONFIG_NAME).read_bytes()})
        with pytest.raises(FileNotFoundError, match=message):
            client("dtem_hf:MergeAdapter.from_reference", reference, **cache)

    def test_a_token_that_may_not_write(self, hub, client, folder):
        client(PUBLISH, str(folder), "me/a", **ME)
        before = hub.repos["me/a"].refs.copy()
        make_adapter(1).save_pretrained(folder)
        for repo_id, token in (("me/a", "hf_reader"), ("me/a", "hf_other"), ("me/new", "hf_reader")):
            with pytest.raises(PermissionError, match=rf"your token may not write to {repo_id}: .*create_pr=True"):
                client(PUBLISH, str(folder), repo_id, token=token)
        with pytest.raises(PermissionError, match="does not accept your token for me/a"):
            client(PUBLISH, str(folder), "me/a", token="hf_nonsense")
        assert hub.repos["me/a"].refs == before and "me/new" not in hub.repos
        client(PUBLISH, str(folder), "me/a", create_pr=True, token="hf_other")
        assert_same(client(LOAD, "me/a", revision="refs/pr/1", cache_dir=str(folder / "c")), make_adapter(1))

    def test_what_is_to_be_private_does_not_end_in_public(self, hub, client, folder):
        hub.create("me/open")
        with pytest.raises(BadValue, match=r"private=True: me/open is there and public"):
            client(PUBLISH, str(folder), "me/open", private=True, **ME)
        assert hub.files("me/open") == {}

    def test_the_token_goes_to_the_hub_and_nowhere_else(self, hub, client, cache, folder):
        client(PUBLISH, str(folder), "me/a", private=True, **ME)
        hub.seen.clear()
        client(LOAD, "me/a", **ME, **cache)
        assert all(seen.authorized for seen in hub.requests("HEAD", "/resolve/"))
        assert [seen.authorized for seen in hub.requests("GET", "/cdn/")] == [False]


class TestCard:
    def test_a_readme_that_is_there_is_kept_unless_told(self, hub, client, folder):
        hub.commit("me/a", {"README.md": b"written by hand"})
        text = client(f"{CLIENT}:warned", PUBLISH, str(folder), "me/a", **ME)
        assert ["me/a has a README.md" in line and "--overwrite-card" in line for line in text] == [True]
        assert hub.files("me/a")["README.md"] == b"written by hand" and set(hub.files("me/a")) == PUBLISHED
        assert client(f"{CLIENT}:warned", PUBLISH, str(folder), "me/a", overwrite_card=True, **ME) == []
        assert b"merge adapter for" in hub.files("me/a")["README.md"]

    def test_a_model_that_lies_in_the_repository_stays_a_model(self, hub, client, folder, vit_folder):
        model = {path.name: path.read_bytes() for path in vit_folder.iterdir()}
        hub.commit("me/a", model)
        client(PUBLISH, str(folder), "me/a", **ME)
        assert hub.files("me/a").items() >= model.items() and set(hub.files("me/a")) == {*PUBLISHED, *model}

    def test_a_readme_that_another_commit_adds_meanwhile_is_kept_too(self, hub, client, folder):
        def meanwhile(repo_id: str) -> None:
            hub.on_commit = None
            hub.commit(repo_id, {"README.md": b"faster", "notes.txt": b"another commit"})

        hub.create("me/a")
        hub.on_commit = meanwhile
        client(PUBLISH, str(folder), "me/a", **ME)
        assert [seen.status for seen in hub.requests("POST", "/commit/")] == [412, 200]
        assert hub.files("me/a")["README.md"] == b"faster"
        assert set(hub.files("me/a")) == {*PUBLISHED, "notes.txt"}

    def test_a_repository_that_never_holds_still_is_given_up(self, hub, client, folder):
        hub.create("me/a")
        hub.on_commit = lambda repo_id: hub.commit(repo_id, {"count": str(len(hub.seen)).encode()})
        with pytest.raises(ConnectionError, match="me/a is being changed by others"):
            client(PUBLISH, str(folder), "me/a", **ME)
        assert set(hub.files("me/a")) == {"count"}

    def test_a_card_that_was_not_edited_names_the_repository(self, hub, client, folder):
        assert 'merge="user/repo"' in (folder / "README.md").read_text()
        client(PUBLISH, str(folder), "me/a", **ME)
        assert b'merge="me/a"' in hub.files("me/a")["README.md"]
        with open(folder / "README.md", "a") as file:
            file.write("\nA word of mine.\n")
        client(PUBLISH, str(folder), "me/b", **ME)
        assert hub.files("me/b")["README.md"] == (folder / "README.md").read_bytes()

    @pytest.mark.skipif(
        Version(huggingface_hub.__version__) < Version("2.0"),
        reason="before 2.0, the client asks the real Hub",
    )
    def test_metadata_passes_the_clients_own_validation(self, hub, client, folder, tmp_path):
        client(f"{CLIENT}:validate_card", str(folder / "README.md"))
        (tmp_path / "bad.md").write_text("---\nlicense: my very own\n---\n# A card\n")
        with pytest.raises(ValueError, match="license"):
            client(f"{CLIENT}:validate_card", str(tmp_path / "bad.md"))
        assert [seen.status for seen in hub.requests("POST", "/validate-yaml")] == [200, 400]

    def test_nothing_of_the_folder_is_published_but_the_adapter(self, hub, client, folder):
        """Records go without tokens and without the folders of this machine; of the pictures, those in the card."""
        (folder / ".env").write_text("SECRET=1")
        (folder / "optimizer.bin").write_bytes(pickle.dumps({"a": 1}))
        (folder / "training.json").write_text(
            json.dumps({"command": "train.py --data /home/alice/photos --token hf_AbCdEfGhIjKlMnOpQrStUv", "steps": 3})
        )
        Image.new("RGB", (4, 4)).save(folder / "other.png")
        Image.new("RGB", (4, 4)).save(folder / "merged_tokens.png")
        (folder / "README.md").unlink()
        client(PUBLISH, str(folder), "me/a", **ME)
        assert set(hub.files("me/a")) == {*PUBLISHED, "training.json", "merged_tokens.png"}
        record = json.loads(hub.files("me/a")["training.json"])
        assert record == {"command": "train.py --data …/photos --token hf_…", "steps": 3}
        assert b"alice" not in b"".join(hub.files("me/a").values())

    def test_a_picture_is_not_followed_out_of_the_folder(self, hub, client, folder, tmp_path):
        (tmp_path / "private.png").write_bytes(b"not for others")
        (folder / "merged_tokens.png").symlink_to(tmp_path / "private.png")
        (folder / "README.md").unlink()
        with pytest.raises(BadValue, match=r"merged_tokens\.png.*in the folder itself"):
            client(PUBLISH, str(folder), "me/a", **ME)
        assert hub.repos == {}

    def test_an_adapter_that_is_not_sound_is_not_published(self, hub, client, folder):
        (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:-1])
        with pytest.raises(AdapterError):
            client(PUBLISH, str(folder), "me/a", **ME)
        assert hub.seen == []


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
            Fault("POST", "/lfs-verify", times=9, status=404),
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


class TestTrust:
    def test_two_files_are_read_and_no_pickle_is_even_fetched(self, hub, client, cache, folder):
        bomb = pickle.dumps({"a": 1})
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        others = dict.fromkeys(("pytorch_model.bin", "merge_adapter.bin", "adapter_model.bin", "model.pkl"), bomb)
        hub.commit("me/a", {**files, **others, "modeling.py": b"raise SystemExit"})
        assert_same(client(LOAD, "me/a", **cache), make_adapter())
        assert {seen.path.rsplit("/", 1)[1] for seen in hub.requests("HEAD")} == {CONFIG_NAME, WEIGHTS_NAME}
        hub.commit("me/a", {WEIGHTS_NAME: bomb})
        with pytest.raises(AdapterError, match="not a readable safetensors file"):
            client(LOAD, "me/a", **cache)

    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
    def test_a_file_that_is_too_large_is_not_downloaded(self, hub, client, cache, folder, name):
        """Larger than any JSON here; larger than 4 layers of width 32 can be."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.commit("me/a", {**files, name: b" " * (3 << 20)})
        with pytest.raises(AdapterError, match=rf"me/a: {name} has 3145728 bytes.*nothing was downloaded"):
            client(LOAD, "me/a", **cache)
        assert not hub.requests("GET", f"{name}|/cdn/")

    def test_transformers_says_what_an_adapter_is(self, hub, client):
        """And loads nothing of it: stock transformers by the model type in config.json, ours in a sentence."""
        push = "dtem_hf:MergeAdapter.push_to_hub"
        client(push, make_adapter(base_model="me/base"), "me/dtem-vit", **ME)
        hub.seen.clear()
        with pytest.raises(ValueError, match="dtem_hf_merge_adapter"):
            client("transformers:AutoModel.from_pretrained", "me/dtem-vit")
        assert not hub.requests("GET", "/cdn/")
        with pytest.raises(
            AdapterError,
            match=r"me/dtem-vit is a merge adapter for me/base .*"
            r"AutoModel\.from_pretrained\('me/base', merge='me/dtem-vit'\)",
        ):
            client("dtem_hf:AutoModel.from_pretrained", "me/dtem-vit")


class TestCommands:
    def test_push_and_info(self, hub, client, folder, tmp_path):
        run = f"{CLIENT}:run_command"
        code, out, err = client(run, "push", str(folder), "me/a", "--dry-run", token="hf_me")
        assert code == 0 and all(name in out for name in PUBLISHED) and hub.seen == []
        options = ("--private", "--branch", "next", "--commit-message", "A try")
        code, out, err = client(run, "push", str(folder), "me/a", *options, token="hf_me")
        assert (code, err) == (0, "")
        assert hub.repos["me/a"].private and set(hub.files("me/a", "next")) == PUBLISHED
        assert hub.repos["me/a"].commits[hub.repos["me/a"].refs["next"]].message == "A try"
        hub.seen.clear()
        code, out, err = client(run, "info", "me/a@next", token="hf_me")
        assert code == 0 and "dtem" in out and "8,448 bytes" in out and "not evaluated" in out
        assert {seen.path.rsplit("/", 1)[1] for seen in hub.requests("HEAD")} == {
            *(CONFIG_NAME, WEIGHTS_NAME),
            "README.md",
        }

    def test_errors_are_one_line(self, hub, client, folder):
        run = f"{CLIENT}:run_command"
        code, out, err = client(run, "info", "me/nothing", token=None)
        assert (code, out) == (1, "") and err.startswith("Error: there is no repository me/nothing")
        code, out, err = client(run, "push", str(folder), "me/a", token="hf_reader")
        assert (code, out) == (1, "") and len(err.splitlines()) == 1 and "may not write to me/a" in err
        code, out, err = client(run, "push", str(folder), "me/a", "--branch", "x", "--create-pr", token="hf_me")
        assert (code, out) == (2, "") and "branch='x'" in err

    def test_a_card_that_is_kept_is_said_in_one_line(self, hub, client, folder):
        hub.commit("me/a", {"README.md": b"mine"})
        code, _, err = client(f"{CLIENT}:run_command", "push", str(folder), "me/a", token="hf_me")
        assert code == 0 and err.startswith("Note: me/a has a README.md, which is kept") and "UserWarning" not in err

    def test_the_hf_command_uploads_and_downloads_an_adapter(self, hub, client, cache, folder, tmp_path):
        environment = hub_environment(hub.endpoint, tmp_path / "home", "hf_me")
        hf = str(Path(sys.executable).with_name("hf"))
        for command in (
            (hf, "upload", "me/a", str(folder), "."),
            (hf, "download", "me/a", "--local-dir", str(tmp_path / "got")),
        ):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        for path in folder.iterdir():
            assert (tmp_path / "got" / path.name).read_bytes() == path.read_bytes()
        assert_same(client(LOAD, str(tmp_path / "got")), make_adapter())
        assert_same(client(LOAD, "me/a", **cache), make_adapter())


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
