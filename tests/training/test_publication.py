"""Runs that publish what they learn, on a Hub on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dtem_hf import BadValue
from dtem_hf.configuration import CONFIG_NAME
from dtem_hf.hub.layout import WEIGHTS_NAME
from dtem_hf.training.arguments import TrainArguments
from tests.support.loopback_hub import Fault


TRAIN = "tests.support.hub_client:train"
RECORDED = {CONFIG_NAME, WEIGHTS_NAME, "training.json", "config.json"}


@pytest.fixture
def published(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "push_to_hub": True, "hub_model_id": "me/run", "push_every": 2}


def test_best_so_far_goes_to_a_branch_and_the_finished_adapter_to_main(hub, client, published, tmp_path):
    """One push on the way fails and does not end the run."""
    hub.faults.append(Fault("POST", "/commit/training", times=3, status=500))
    out = client(TRAIN, {**published, "hub_private_repo": True})
    assert f"published: {hub.endpoint}/me/run/commit/" in out
    assert "step 2: not published; training continues: me/run: the upload failed" in out
    assert hub.repos["me/run"].private
    local = Path(published["output_dir"], "adapter")
    files = hub.files("me/run")
    assert set(files) == {*RECORDED, "README.md"}
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert files[name] == (local / name).read_bytes()
    assert b"- Steps: 6" in files["README.md"] and b'merge="me/run"' in files["README.md"]
    assert "- Steps: 6" in (local / "README.md").read_text()
    # The pushes on the way: without a card, and the last one was of step 4.
    assert set(hub.files("me/run", "training")) == RECORDED
    messages = [commit.message for commit in hub.repos["me/run"].commits.values()]
    assert next(text for text in messages if text.startswith("Step")).startswith("Step 4: best adapter so far")
    record = json.loads(files["training.json"])
    assert record["arguments"]["output_dir"] == "…/run" and str(tmp_path) not in str(files)


def test_end_to_end_the_whole_model_lies_beside_the_adapter(hub, client, published):
    """One repository is both: a merged model, and the adapter for whoever has the backbone."""
    client(TRAIN, {**published, "push_every": 0, "train_backbone": True})
    files, run = hub.files("me/run"), Path(published["output_dir"])
    assert {CONFIG_NAME, WEIGHTS_NAME, "README.md", "preprocessor_config.json"} < set(files)
    assert files["model.safetensors"] == (run / "model" / "model.safetensors").read_bytes()
    config = json.loads(files["config.json"])
    assert config["model_type"] == "vit" and config["merge"]["r"] == 2


def test_killed_in_a_push_it_goes_on_and_ends_in_the_same_bits(hub, client, published, options, tmp_path):
    client(TRAIN, {**options, "output_dir": str(tmp_path / "whole")})
    published["push_every"] = 4
    fault = Fault("POST", "/commit/training", delay=5.0)
    hub.faults.append(fault)
    process = client("tests.support.hub_client:start", TRAIN, published)
    deadline = time.monotonic() + 120
    while fault.times and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(client("os:waitpid", process, 0)[1]) == -signal.SIGKILL
    assert fault.times == 0 and "README.md" not in hub.files("me/run")
    out = client(TRAIN, published)
    assert "resuming from" in out and "published:" in out
    assert hub.files("me/run")[WEIGHTS_NAME] == (tmp_path / "whole" / "adapter" / WEIGHTS_NAME).read_bytes()


def test_a_last_push_that_fails_is_made_up_for_by_the_same_command(hub, client, published):
    published["push_every"] = 0
    hub.faults.append(Fault("POST", "/commit/main", times=3, status=500))
    with pytest.raises(ConnectionError, match="me/run: the upload failed"):
        client(TRAIN, published)
    metrics = Path(published["output_dir"], "metrics.jsonl").read_text()
    assert len(metrics.splitlines()) > 6 and hub.files("me/run") == {}
    assert "published:" in client(TRAIN, published)
    assert Path(published["output_dir"], "metrics.jsonl").read_text() == metrics
    assert {*RECORDED, "README.md"} == set(hub.files("me/run"))


@pytest.mark.parametrize("token", ["hf_reader", None])
def test_who_may_not_publish_hears_of_it_before_training(hub, client, published, token):
    with pytest.raises(PermissionError, match=r"(may not write to|wants a token for) me/run"):
        client(TRAIN, published, token=token)
    assert not Path(published["output_dir"]).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"push_to_hub": True}, "hub_model_id=None"),
        ({"push_every": 3}, "push_every=3.*push_to_hub"),
        ({"push_to_hub": True, "hub_model_id": "a/b", "push_every": -1}, "push_every=-1"),
    ],
)
def test_options_that_contradict_each_other(options, changes, message):
    with pytest.raises(BadValue, match=message):
        TrainArguments(**options, **changes)
