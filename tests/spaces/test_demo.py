"""The demo Space in a real browser: upload, compare, r, a trained adapter, a broken file, and a phone's width."""

from __future__ import annotations

import os
import re
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dtem_hf import AutoModelForImageClassification, DTEMConfig, ToMeConfig
from dtem_hf.opening import load_processor, open_image
from tests.support.children import Child, run_python


SPACE = Path(__file__).resolve().parents[2] / "spaces" / "demo"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH (Debian: chromium)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, vit_folder: Path, image_folder: Path) -> Path:
    """What `make quickstart` writes, untrained: a ViT of 4 layers and 16 patches, pictures, an adapter."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(vit_folder, folder / "vit")
    (folder / "digits" / "test").mkdir(parents=True)
    for path in sorted(image_folder.glob("*.png"))[:6]:
        shutil.copy(path, folder / "digits" / "test")
    merged = AutoModelForImageClassification.from_pretrained(folder / "vit", merge=DTEMConfig(r=3))
    merged.save_merge_adapter(folder / "merge" / "adapter")
    return folder


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The Space as a server."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    settings = {"DEMO_FOLDER": str(folder), "GRADIO_SERVER_PORT": str(port)}
    local = {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    environment = {**os.environ, **settings, **local, "PYTHONPATH": str(SPACE.parents[1])}
    server = Child([SPACE / "app.py"], folder / "server.log", environment)
    url, ends = f"http://127.0.0.1:{port}", time.monotonic() + 60
    try:
        while True:
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).close()
                break
            except OSError:
                assert server.is_alive() and time.monotonic() < ends, server.log.read_text()
                time.sleep(0.1)
        yield url
    finally:
        server.kill()


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as url:
        yield url


def test_the_page_opens_before_the_built_in_model_is_trained(tmp_path: Path) -> None:
    """Its digits are there to be picked."""
    with served(tmp_path):
        assert not (tmp_path / "vit").exists()
    assert len(list((tmp_path / "digits" / "test").glob("*.png"))) == 450


def test_a_machine_without_gradio_is_told_what_to_install() -> None:
    program = f"import runpy, sys; sys.modules['gradio'] = None; runpy.run_path({str(SPACE / 'app.py')!r})"
    run = run_python(["-c", program], cwd=SPACE.parents[1])
    assert run.returncode == 1 and "Traceback" not in run.stderr
    last = run.stderr.splitlines()[-1]  # libraries may say something of their own before
    assert last.startswith("Error: ") and last.endswith('pip install "dtem-hf[demo]"')


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def shown(page: Any, name: str) -> list[tuple[str, int]]:
    """The classes of a list with their percentages."""
    rows = page.locator(f"#{name}").inner_text().split("\n")
    return [(rows[i], int(rows[i + 1].rstrip("%"))) for i in range(len(rows) - 1) if rows[i + 1].endswith("%")]


def expected(folder: Path, picture: Path, merge: Any) -> list[tuple[str, int]]:
    model = AutoModelForImageClassification.from_pretrained(folder / "vit", merge=merge).eval()
    pixels = load_processor(str(folder / "vit"))(images=open_image(picture, "x"), return_tensors="pt").pixel_values
    with torch.inference_mode():
        values, ids = model(pixels).logits[0].softmax(-1).topk(5)
    return [(model.config.id2label[int(i)], round(100 * float(value))) for value, i in zip(values, ids, strict=True)]


@needs_chromium
def test_a_user_uploads_compares_moves_r_and_hands_in_a_broken_file(
    browser: Any, address: str, folder: Path, tmp_path: Path
) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(20_000)
    page.goto(address)
    picture = sorted((folder / "digits" / "test").glob("*.png"))[5]
    page.locator("input[type=file]").set_input_files(picture)
    page.get_by_text("layer 4: ").first.wait_for()
    assert shown(page, "plain") == expected(folder, picture, None)
    assert shown(page, "merged") == expected(folder, picture, ToMeConfig(r=8))
    assert "merge=ToMeConfig(r=8)" in page.locator("#code").inner_text()
    assert page.locator("#layers button img").count() >= 5  # the input and four layers

    page.locator("#r input[type=number]").fill("3")
    page.locator("#compare").click()
    page.get_by_text("merge=ToMeConfig(r=3)").wait_for()
    plan = AutoModelForImageClassification.from_pretrained(folder / "vit", merge=ToMeConfig(r=3)).merge_plan()
    page.get_by_text(f"layer 4: {plan.tokens[-1] - 1} tokens").first.wait_for()
    assert shown(page, "merged") == expected(folder, picture, ToMeConfig(r=3))
    figures = page.locator("#figures").inner_text()
    assert re.search(rf"M multiply-adds\s+[\d.]+\s+{plan.multiply_adds / 1e6:.2f}\s+{plan.ratio:.2f}", figures)

    page.get_by_label("a trained adapter").check()
    page.locator("#compare").click()
    page.get_by_text(f"merge={str(folder / 'merge' / 'adapter')!r}").wait_for()
    assert shown(page, "merged") == expected(folder, picture, str(folder / "merge" / "adapter"))

    broken = tmp_path / "broken.png"
    broken.write_text("this is no picture")
    page.locator("input[type=file]").set_input_files(broken)
    page.get_by_text("image broken.png cannot be read").wait_for()

    page.get_by_label("Model").fill(str(tmp_path))
    page.get_by_label("Model").press("Enter")
    page.locator("#compare").click()
    page.get_by_text(f"Unrecognized model in {tmp_path}").wait_for()
    page.close()


@needs_chromium
def test_nothing_is_wider_than_a_phone(browser: Any, address: str, folder: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(20_000)
    page.goto(address)
    picture = sorted((folder / "digits" / "test").glob("*.png"))[5]
    page.locator("input[type=file]").set_input_files(picture)
    page.get_by_text("layer 4: ").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_the_hub_is_told_what_it_needs_to_run_the_space() -> None:
    header = yaml.safe_load((SPACE / "README.md").read_text("utf-8").split("---")[1])
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert {"title", "sdk_version", "license", "colorFrom", "colorTo"} <= header.keys()
    assert len(header["short_description"]) <= 60
    assert "dtem-hf[quickstart]" in (SPACE / "requirements.txt").read_text("utf-8").split()
