"""What holds for every task: one row each."""

import pytest
import torch

from dtem_hf import BadValue
from dtem_hf.training.arguments import TrainArguments
from dtem_hf.training.parameters import learned_parameters, relax
from dtem_hf.training.tasks import make_task, task_names


# task, backbone, what it needs beside the options of a short run
ROWS = [
    ("distillation", "vit_folder", {}),
    ("distillation", "vit_folder", {"feature_weight": 1.0, "features": "patches", "feature_loss": "mse"}),
    ("classification", "vit_folder", {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}),
    ("feature_distillation", "vit_folder", {}),
    ("feature_distillation", "clip_folder", {"feature_loss": "mse"}),
    ("feature_distillation", "siglip_folder", {}),
    ("feature_distillation", "clip_folder", {"features": "grid"}),
    ("captioning", "git_folder", {}),
    ("captioning", "blip_folder", {"distillation_weight": 0.5}),
    ("contrastive", "clip_folder", {"distillation_weight": 0.5}),
    ("contrastive", "siglip_folder", {"distillation_weight": 0.5}),
]


# Tasks that say nothing about the backbone, and are refused end to end.
FROZEN_ROWS = [
    ("fisher", "vit_folder", {}),
    ("feature_fisher", "clip_folder", {}),
    ("feature_fisher", "siglip_folder", {"features": "grid"}),
    ("caption_fisher", "git_folder", {}),
    ("caption_fisher", "blip_folder", {}),
]


def name_of(row):
    return "-".join((*row[:2], *row[2]))


@pytest.fixture(params=[*ROWS, *FROZEN_ROWS], ids=name_of)
def row(request, options, caption_options):
    return _row(request, options, caption_options)


@pytest.fixture(params=ROWS, ids=name_of)
def end_to_end_row(request, options, caption_options):
    return {**_row(request, options, caption_options), "train_backbone": True}


def _row(request, options, caption_options):
    task, folder, changes = request.param
    base = caption_options if task in ("captioning", "caption_fisher", "contrastive") else options
    model = str(request.getfixturevalue(folder))
    return {**base, "model": model, "task": task, "r": "3", "init": "random", "augmentation": "none", **changes}


def batch_of(run, size=8):
    batch = run.data.collate([run.data.train[0, i] for i in range(size)])
    if run.task.name == "classification":
        batch["labels"] = batch["index"] % 5
    return batch


def descend(run, batch, steps, lr):
    """Losses of gradient descent on one batch."""
    optimizer, losses = torch.optim.Adam(learned_parameters(run.model), lr=lr), []
    for _ in range(steps):
        torch.manual_seed(0)  # one dropout mask
        loss = run.task.loss(run.model, run.model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_there_is_a_row_for_every_task():
    assert {row[0] for row in [*ROWS, *FROZEN_ROWS]} == set(task_names())


def test_embedding_learns_what_lowers_the_loss_and_the_backbone_stays(row, make_run):
    run = make_run(row)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if "merge_embedding" not in name}
    losses = descend(run, batch_of(run), steps=12, lr=0.01)
    assert min(losses) < losses[0]
    for name, parameter in run.model.named_parameters():
        if "merge_embedding" in name:
            assert parameter.requires_grad
        else:
            assert torch.equal(parameter, before[name]) and parameter.grad is None, name


def test_unmerged_model_is_its_own_equal(row, make_run):
    """With r = 0 every distance to the unmerged model is 0, and every agreement full."""
    run = make_run({**row, "r": "0"})
    batch = batch_of(run)
    relax(run.model, False)
    with torch.no_grad():
        figures = run.task.figures(run.model, batch, run.task.reference(run.model, batch))
    for name in {"kl", "distance", "similarity_kl"} & figures.keys():
        torch.testing.assert_close(figures[name], torch.zeros(len(figures[name])), rtol=0, atol=2e-6)
    for name in {"agreement", "retrieval"} & figures.keys():
        assert (figures[name] == 100).all(), name
    assert run.task.ranked_by in figures
    assert {len(value) for value in figures.values()} == {8}


def test_end_to_end_the_backbone_learns_from_a_teacher_that_stays(end_to_end_row, make_run):
    run = make_run(end_to_end_row)
    batch = batch_of(run)
    reference = run.task.reference(run.model, batch)
    losses = descend(run, batch, steps=8, lr=1e-4)
    assert min(losses) < losses[0]
    moved = [name for name, p in run.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any("merge_embedding" in name for name in moved) and any("embeddings" in name for name in moved)
    assert torch.equal(run.task.reference(run.model, batch), reference)
    inputs = {"pixel_values": batch["pixel_values"]}
    if run.task.name == "captioning":
        inputs |= {name: batch[name] for name in ("input_ids", "attention_mask")}
    relax(run.model, False)
    with run.model.unmerged(), torch.no_grad():
        now = run.model(**inputs)[0]
    assert not torch.equal(now, run.task.unmerged(run.model, **inputs)[0])


def test_whole_model_is_saved_as_it_is(end_to_end_row, make_run, tmp_path):
    run = make_run(end_to_end_row)
    descend(run, batch_of(run), steps=1, lr=1e-2)
    relax(run.model, False)
    run.task.save_model(run.model, tmp_path / "saved")
    arguments = TrainArguments(**{**end_to_end_row, "model": str(tmp_path / "saved")})
    task = make_task(arguments.task, arguments)
    loaded = task.load_model().eval()
    for name, parameter in run.model.named_parameters():
        if "merge_embedding" not in name:
            assert torch.equal(loaded.get_parameter(name), parameter), name


def test_unknown_task_is_named():
    with pytest.raises(BadValue, match="task='guessing': one of caption_fisher, captioning"):
        make_task("guessing", TrainArguments(model="m", data="d"))
