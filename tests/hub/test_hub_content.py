"""What is published and what is read of it: cards, files, and the commands that do both."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from packaging.version import Version
from PIL import Image

from dtem_hf import AdapterError, BadValue
from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.layout import WEIGHTS_NAME
from tests.support.adapters import CLIENT, LOAD, ME, PUBLISH, PUBLISHED, assert_same, make_adapter
from tests.support.hub_client import hub_environment


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
