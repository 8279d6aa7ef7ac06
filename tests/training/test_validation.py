"""A glance at one batch: what the soft and the hard model say of it, and how many tokens are left."""

import pytest
import torch

from dtem_hf import AutoModelForImageClassification, DTEMConfig, ToMeConfig, attach
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.program import train
from dtem_hf.training.validation import effective_tokens
from tests.support.training_processes import logged


def glances(output_dir):
    lines = logged(output_dir)
    return {line["step"]: line for line in lines if "glance" in line}


def test_glance_sees_what_the_whole_validation_sees_where_the_batch_is_the_whole(options):
    options.update(batch_size=8, glance_every=3, validate_every=3)
    train(TrainArguments(**options))
    seen = glances(options["output_dir"])
    assert sorted(seen) == [3, 6]
    lines = logged(options["output_dir"])
    for line in lines:
        if "validation" in line and line["step"]:
            glance = seen[line["step"]]["glance"]
            assert glance["hard"] == pytest.approx(line["validation"], rel=1e-6)
            assert glance["gap"]["kl"] == pytest.approx(glance["hard"]["kl"] - glance["soft"]["kl"])
            assert glance["soft"]["kl"] != glance["hard"]["kl"]


def test_glance_changes_nothing_about_a_run(options, tmp_path):
    with_and_without = [
        train(TrainArguments(**{**options, "glance_every": every, "output_dir": str(tmp_path / str(every))}))
        for every in (0, 1)
    ]
    assert with_and_without[0]["best_validation"] == with_and_without[1]["best_validation"]
    learned = [(tmp_path / f"{every}/adapter/merge_adapter.safetensors").read_bytes() for every in (0, 1)]
    assert learned[0] == learned[1]


def test_where_nothing_is_merged_there_is_no_gap_and_every_token(options):
    train(TrainArguments(**{**options, "r": "[0, 0, 0, 1]", "glance_every": 6}))
    assert glances(options["output_dir"])[6]["tokens"][:3] == [17, 17, 17]


def test_effective_tokens_are_the_tokens_where_merging_is_hard_and_more_where_it_is_soft(vit_folder):
    model = attach(AutoModelForImageClassification.from_pretrained(vit_folder), ToMeConfig(r=3)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), model.trace_merging() as trace:
        model(pixels)
    assert [effective_tokens(sizes).tolist() for sizes in trace.sizes] == [[n, n] for n in (14, 11, 8, 5)]
    soft = attach(model, DTEMConfig(r=3, relaxation="soft"))
    with torch.no_grad(), soft.trace_merging() as trace:
        soft(pixels)
    for sizes, hard in zip(trace.sizes, (14, 11, 8, 5), strict=True):
        left = effective_tokens(sizes)
        assert sizes.shape[1] == 17 and (left > hard - 1e-3).all() and (left < 17).all()
        assert left.tolist() == [pytest.approx(sum(min(m, 1.0) for m in row)) for row in sizes.tolist()]
