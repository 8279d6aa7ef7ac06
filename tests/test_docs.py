"""The tables in docs are what their JSON holds, by the code that wrote them; the Python in docs runs as it stands."""

import json
import re
from pathlib import Path

import pytest
import transformers as tf

import dtem_hf
from dtem_hf import DTEMConfig, MergeConfig, attach
from dtem_hf.benchmark import tables as benchmark_tables
from dtem_hf.evaluation import dense
from dtem_hf.evaluation.comparison import csv_table, markdown
from dtem_hf.families.containers import CONTAINERS
from tests.models.test_processor import saved_processor
from tests.support import documents
from tests.support.containers import built, llava
from tests.support.families import CASES


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("path", sorted(DOCS.rglob("comparison.json")), ids=lambda path: path.parent.name)
def test_comparison_is_what_the_json_holds(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(result)
    assert path.with_suffix(".csv").read_text(encoding="utf-8") == csv_table(result["rows"])
    for row in result["rows"][1:]:
        assert row["ratio"] <= row["r"]["flops"] or row["method"] == "soft"
    assert (path.parent / "pareto.png").is_file()


def test_there_is_a_comparison_to_check():
    assert list(DOCS.rglob("comparison.json"))


@pytest.mark.parametrize("path", sorted(DOCS.glob("performance/*/benchmark.json")), ids=lambda path: path.parent.name)
def test_benchmark_is_what_the_json_holds(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == benchmark_tables.markdown(result)
    assert (path.parent / "speedup.png").is_file()
    assert f"(performance/{path.parent.name}/benchmark.md)" in (DOCS / "performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(DOCS.rglob("dense.json")), ids=lambda path: path.parent.name)
def test_the_page_on_dense_heads_is_what_the_json_holds(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == dense.markdown(result)
    page = (DOCS / "dense.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line in shown for line in dense.markdown(result).splitlines() if line.startswith("|"))
    assert f"`{result['command']}`" in " ".join(page.split())
    assert f"](dense/{path.parent.name}/dense.md)" in page


def test_the_page_on_methods_shows_what_the_comparison_found():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = json.loads((DOCS / "deit-tiny/methods/comparison.json").read_text(encoding="utf-8"))["rows"]
    shown = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| −")]
    for cost, *figures in shown:
        found = [row["top1"] for row in rows if row["r"] and f"−{100 * (1 - row['r']['flops']):.0f} %" == cost]
        assert figures == [f"{value:.1f}" for value in found]
    assert len(shown) == 4


@pytest.mark.parametrize("config", MergeConfig._methods.values(), ids=lambda config: config.method)
def test_the_page_on_methods_names_every_one(config):
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert f"| {config.title} | `{config.__name__}(" in page and f"**{config.title}**" in page


@pytest.fixture(scope="module")
def folders(make_classifier, tmp_path_factory):
    """Small models, and an adapter, by the names that the pages use."""
    folder = tmp_path_factory.mktemp("named")
    model = make_classifier()
    model.save_pretrained(folder / "classifier")
    tf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "classifier")
    attach(model, DTEMConfig(r=2)).save_merge_adapter(folder / "adapter", base_model=documents.CLASSIFIER)
    built(llava)[0].save_pretrained(folder / "llava")
    saved_processor(folder / "llava", "llava")
    return {
        documents.CLASSIFIER: folder / "classifier",
        documents.LANGUAGE_MODEL: folder / "llava",
        documents.ADAPTER: folder / "adapter",
    }


def test_the_page_on_readers_names_every_family_and_container():
    page = re.sub(r"[\W_]", "", (DOCS / "which-model.md").read_text(encoding="utf-8")).lower()
    names = {name.removesuffix("_backbone") for name in (*CASES, *CONTAINERS)}
    assert not [name for name in names if re.sub(r"[\W_]", "", name) not in page]


LOADED = (
    f"dtem_hf.AutoModelForImageClassification.from_pretrained('{documents.CLASSIFIER}', merge=dtem_hf.DTEMConfig(2))"
)
AGAIN = "AutoModelForImageClassification.from_pretrained('merged').merge_config.r.r == 13"
# Each page with Python: the model that a reader has before it, and what must hold behind it.
RUN = {
    "README.md": ("", "model.merge_config.r == 13"),
    "docs/index.md": ("", "model.merge_config.r == 13"),
    "docs/quickstart.md": ("", f"not hasattr(model, 'merge_config') and {AGAIN} and len(classify(picture)) == 5"),
    "docs/which-r.md": (LOADED, "isinstance(advice, dtem_hf.Advice) and model.merge_plan().ratio <= 0.6"),
    "docs/which-model.md": (
        f"dtem_hf.AutoModelForImageTextToText.from_pretrained('{documents.LANGUAGE_MODEL}')",
        "(inputs['input_ids'] == 5).sum() == 64 - 3 * 12 and answer.shape[1] > inputs['input_ids'].shape[1]",
    ),
    "docs/train.md": ("", "dtem_hf.MergeAdapter.from_reference('my-adapter').config.r == 16"),
    "docs/dense.md": ("", "shade(torch.zeros(2, 384, 16, 14)).shape == (2, 16, 14)"),
    "docs/publish.md": (LOADED, "model.merge_config.r == 2 and dtem_hf.MergeAdapter.from_reference('my-adapter')"),
    "docs/performance.md": (
        LOADED,
        "globals().update(patch=lambda m, r: dtem_hf.attach(m, dtem_hf.ToMeConfig(r)))"
        " or merged(dtem_hf.detach(model), 3)(pixel_values).shape == (2, 10)",
    ),
}


@pytest.mark.parametrize("page", RUN)
def test_the_python_of_a_page_runs(page, hub, client, folders, tmp_path):
    documents.fill(hub, folders)
    assert client("tests.support.documents:run", page, *RUN[page], str(tmp_path))


def test_every_page_with_python_is_run():
    pages = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    assert [path for path in pages if documents.blocks_of(path)] == [
        path for path in pages if path.relative_to(ROOT).as_posix() in RUN
    ]


@pytest.mark.parametrize(
    ("page", "source"),
    [("CONTRIBUTING.md", "dtem_hf/families/clip.py"), ("tests/README.md", "tests/families/vit_msn.py")],
)
def test_what_a_page_quotes_is_in_its_file(page, source):
    (block,) = documents.blocks_of(ROOT / page)
    assert block in (ROOT / source).read_text(encoding="utf-8")


def test_the_reference_names_all_that_is_public():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    assert [name for name in dtem_hf.__all__ if f"::: dtem_hf.{name}\n" not in page and f"`{name}`" not in page] == []
