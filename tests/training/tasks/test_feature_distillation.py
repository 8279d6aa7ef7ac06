"""Features: what is compared in which model, by hand, softly and hard; and who finds whom."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText as StockModel
from transformers import CLIPVisionModel, LlavaNextImageProcessorPil, SiglipVisionModel, ViTModel

from dtem_hf import AutoModelForImageTextToText, BadValue, DTEMConfig, MergeAdapter, attach
from dtem_hf.models.distances import feature_distance, recorded_features
from dtem_hf.training.parameters import freeze_backbone, relax
from dtem_hf.training.tasks.feature_distillation import nearest
from tests.models.test_processor import saved_processor
from tests.support.containers import built, llava, llava_next, paligemma, prompt, qwen2_vl, vipllava


CASES = [
    ("clip_folder", CLIPVisionModel, "auto", lambda out: out.pooler_output),
    ("clip_folder", CLIPVisionModel, "cls", lambda out: out.last_hidden_state[:, 0]),
    ("clip_folder", CLIPVisionModel, "patches", lambda out: out.last_hidden_state[:, 1:].mean(1)),
    ("siglip_folder", SiglipVisionModel, "auto", lambda out: out.pooler_output),
    ("siglip_folder", SiglipVisionModel, "patches", lambda out: out.last_hidden_state.mean(1)),
    ("clip_folder", CLIPVisionModel, "grid", lambda out: out.last_hidden_state[:, 1:]),
    ("siglip_folder", SiglipVisionModel, "grid", lambda out: out.last_hidden_state),
    ("vit_folder", ViTModel, "auto", lambda out: out.last_hidden_state[:, 0]),  # its pooler is not in the checkpoint
]


@torch.no_grad()
@pytest.mark.parametrize(("folder", "stock", "kind", "expected"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_unmerged_features_are_the_stock_models(folder, stock, kind, expected, options, request, make_run):
    folder = str(request.getfixturevalue(folder))
    run = make_run({**options, "model": folder, "task": "feature_distillation", "features": kind})
    batch = run.data.collate([run.data.train[0, i] for i in range(3)])
    reference = run.task.reference(run.model, batch)
    torch.testing.assert_close(reference, expected(stock.from_pretrained(folder).eval()(batch["pixel_values"])))


@torch.no_grad()
@pytest.mark.parametrize("soft", [False, True])
def test_mean_of_patches_is_weighted_by_sizes(clip_folder, soft):
    """A token that stands for three patches counts three times, as the trace says how large tokens are."""
    model = attach(CLIPVisionModel.from_pretrained(clip_folder), DTEMConfig(r=4))
    freeze_backbone(model)
    relax(model, soft)
    pixels = torch.randn(2, 3, 32, 32)
    with model.trace_merging() as trace, recorded_features(model, "patches") as features:
        model(pixel_values=pixels)
        pooled = features()
    tokens = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]  # a soft merge keeps all
    sizes = trace.sizes[-1][:, 1:]
    assert tokens.shape[1] == (17 if soft else 5)
    by_hand = torch.stack([
        sum(size * token for size, token in zip(sizes[b], tokens[b, 1:], strict=True)) / sizes[b].sum()
        for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(pooled, by_hand, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_grid_has_every_patch_in_its_place(clip_folder):
    """Of a merged patch, the token that the source map names."""
    model = attach(CLIPVisionModel.from_pretrained(clip_folder), DTEMConfig(r=4)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with model.trace_merging() as trace, recorded_features(model, "grid") as features:
        model(pixel_values=pixels)
        grid = features()
    tokens = model(pixel_values=pixels).last_hidden_state
    assert tokens.shape[1] == 5 and grid.shape == (2, 16, 32)
    for b in range(2):
        for patch in range(16):
            assert torch.equal(grid[b, patch], tokens[b, trace.source_maps[-1][b, 1 + patch]])


@pytest.mark.parametrize("task", ["feature_distillation", "feature_fisher"])
def test_a_head_is_compared_by_its_maps(task, clip_folder, options, make_run, tmp_path, monkeypatch):
    """Its loss is the distance of the maps, which are made of the grid as the head makes them."""
    weight = torch.linspace(-1, 1, 32)
    (tmp_path / "my_trained_heads.py").write_text(
        "import torch\n"
        "def shade(patches):\n"
        "    return torch.einsum('bdrc,d->brc', patches, torch.linspace(-1, 1, 32)).sigmoid()\n"
    )
    monkeypatch.chdir(tmp_path)
    changes = {"model": str(clip_folder), "task": task, "head": "my_trained_heads:shade", "feature_loss": "mse"}
    run = make_run({**options, **changes})
    relax(run.model, False)
    batch = run.data.collate([run.data.train[0, i] for i in range(3)])
    with torch.no_grad():
        merged = recorded(run.model, batch["pixel_values"])
        with run.model.unmerged():
            plain = recorded(run.model, batch["pixel_values"])
        squares = ((merged @ weight).sigmoid() - (plain @ weight).sigmoid()).square().mean(dim=1)
        reference = run.task.reference(run.model, batch)
        torch.testing.assert_close(run.task.figures(run.model, batch, reference)["distance"], squares)
    loss = run.task.loss(run.model, run.model, batch)
    if task == "feature_distillation":
        assert loss.item() == pytest.approx(squares.mean().item(), rel=1e-5)
    else:
        loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in run.model.merge_parameters())


def recorded(model, pixels):
    with recorded_features(model, "grid") as features:
        model(pixel_values=pixels)
        return features()


def test_distances_by_hand():
    reference, features = torch.randn(4, 7), torch.randn(4, 7)
    for i in range(4):
        a, b = reference[i].double(), features[i].double()
        cosine = 1 - (a @ b / (a.norm() * b.norm())).item()
        assert feature_distance(reference, features, "cosine")[i].item() == pytest.approx(cosine, abs=1e-6)
        squares = sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)) / 7
        assert feature_distance(reference, features, "mse")[i].item() == pytest.approx(squares, rel=1e-5)
    stacked = [torch.stack([x, x.flip(0)], dim=1) for x in (reference, features)]  # of a grid, the mean over patches
    for kind in ("cosine", "mse"):
        each = feature_distance(reference, features, kind)
        torch.testing.assert_close(feature_distance(*stacked, kind), (each + each.flip(0)) / 2)


def test_nearest_is_another_image():
    gallery, queries = torch.randn(6, 5), torch.randn(6, 5)
    found = nearest(queries, gallery)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        best = max(others, key=lambda j: F.cosine_similarity(queries[i], gallery[j], dim=0).item())
        assert found[i] == best


@pytest.mark.parametrize(
    ("folder", "kind", "message"),
    [
        ("siglip_folder", "cls", "features='cls': pooled or patches, as SiglipVisionModel has no CLS"),
        ("clip_folder", "middle", "features='middle': one of auto, pooled, cls, patches"),
    ],
)
def test_features_that_a_model_has_not(folder, kind, message, options, request, make_run):
    changes = {"model": str(request.getfixturevalue(folder)), "task": "feature_distillation", "features": kind}
    with pytest.raises(BadValue, match=message):
        run = make_run({**options, **changes})
        run.task.loss(run.model, run.model, run.data.collate([run.data.train[0, 0]]))


def test_encoder_without_a_head_is_sent_here(options, make_run, tmp_path):
    ViTModel.from_pretrained(options["model"]).save_pretrained(tmp_path / "bare")
    with pytest.raises(BadValue, match=r"lacks classifier.*feature_distillation"):
        make_run({**options, "model": str(tmp_path / "bare")})


def saved_container(build, folder):
    model, _ = built(build)
    model.save_pretrained(folder)
    saved_processor(folder, "paligemma" if build is paligemma else "llava")
    return str(folder)


@torch.no_grad()
@pytest.mark.parametrize("build", [llava, vipllava, paligemma])
def test_of_a_vision_language_model_what_its_language_model_reads_is_compared(build, options, make_run, tmp_path):
    """Unmerged features are what the stock model's projector gets; merged ones, those of the merged whole."""
    folder = saved_container(build, tmp_path / "model")
    run = make_run({**options, "model": folder, "task": "feature_distillation", "r": "5"})
    batch = run.data.collate([run.data.train[0, i] for i in range(3)])
    read = []

    def look(model):
        model.model.multi_modal_projector.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        model.eval()(**{**prompt(64, 3), "pixel_values": batch["pixel_values"]})
        return read[-1].unflatten(-1, (-1, 32)).flatten(2)

    reference = run.task.reference(run.model, batch)
    torch.testing.assert_close(reference, look(StockModel.from_pretrained(folder)))
    relax(run.model, False)
    merged = look(AutoModelForImageTextToText.from_pretrained(folder, merge=DTEMConfig(r=5)))
    distances = feature_distance(reference, merged, "cosine")
    torch.testing.assert_close(run.task.figures(run.model, batch, reference)["distance"], distances)
    assert distances.min() > 1e-3


@pytest.mark.parametrize("task", ["feature_distillation", "feature_fisher"])
def test_an_adapter_of_a_tower_fits_the_whole_vision_language_model(task, options, make_run, tmp_path):
    """Trained from the saved whole, with an option that says how its language model reads the tokens."""
    folder = saved_container(llava, tmp_path / "model")
    changes = {"model": folder, "task": task, "unmerge": False, "part": "vision_tower", "steps": 2, "r": "5"}
    run = make_run({**options, **changes})
    start = run.model.to_merge_adapter().tensors
    run.train()
    assert not torch.equal(run.model.to_merge_adapter().tensors["layers.0.weight"], start["layers.0.weight"])
    learned = MergeAdapter.from_reference(tmp_path / "run" / "adapter")
    whole = AutoModelForImageTextToText.from_pretrained(folder, merge=str(tmp_path / "run" / "adapter")).eval()
    assert whole.merge_config.part == "model.vision_tower" and whole.merge_config.unmerge is False
    assert all(torch.equal(x, learned.tensors[name]) for name, x in whole.to_merge_adapter().tensors.items())
    inputs = prompt(64 - 3 * 5)
    assert whole.generate(**inputs, max_new_tokens=2, min_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


@torch.no_grad()
def test_of_an_image_in_tiles_the_first_is_seen(options, make_run, tmp_path):
    folder = saved_container(llava_next, tmp_path / "model")
    size = {"height": 32, "width": 32}
    points = [[64, 64], [32, 64]]
    tiles = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=size, image_grid_pinpoints=points)
    tiles.save_pretrained(folder)
    run = make_run({**options, "model": folder, "task": "feature_distillation", "r": "5"})
    batch = run.data.collate([run.data.train[0, i] for i in range(3)])
    for i in range(3):
        seen = tiles(run.data.train.open(i), return_tensors="pt")["pixel_values"]
        assert seen.shape[1:] == (5, 3, 32, 32) and torch.equal(batch["pixel_values"][i], seen[0, 0])
    assert run.task.loss(run.model, run.model, batch) > 0


def test_what_a_vision_language_model_does_not_read_is_refused(options, make_run, tmp_path):
    folder = saved_container(llava, tmp_path / "llava")
    with pytest.raises(BadValue, match="features='cls': auto or grid: LlavaModel reads every patch"):
        make_run({**options, "model": folder, "task": "feature_distillation", "features": "cls"})
    folder = saved_container(qwen2_vl, tmp_path / "qwen2_vl")
    with pytest.raises(BadValue, match=r"an encoder of whole images, and Qwen2Vision\w+ takes .*rows of patches"):
        make_run({**options, "model": folder, "task": "feature_distillation"})
