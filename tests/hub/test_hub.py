"""Adapters on a Hub: the real client, in a process of its own, against a server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from dtem_hf import AutoModelForImageClassification, BadValue
from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.layout import WEIGHTS_NAME
from tests.support.adapters import CLIENT, LOAD, ME, PUBLISH, PUBLISHED, assert_same, make_adapter
from tests.support.hub_client import hub_environment


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
            ("my-adapter", r"merge='my-adapter': a folder that exists, a Hub id \(user/repo\)"),
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
        with pytest.raises(BadValue, match=r"private=True: me/open exists and is public"):
            client(PUBLISH, str(folder), "me/open", private=True, **ME)
        assert hub.files("me/open") == {}

    def test_the_token_goes_to_the_hub_and_nowhere_else(self, hub, client, cache, folder):
        client(PUBLISH, str(folder), "me/a", private=True, **ME)
        hub.seen.clear()
        client(LOAD, "me/a", **ME, **cache)
        assert all(seen.authorized for seen in hub.requests("HEAD", "/resolve/"))
        assert [seen.authorized for seen in hub.requests("GET", "/cdn/")] == [False]
