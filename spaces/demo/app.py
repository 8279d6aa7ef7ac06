"""A page that shows what merging does to a picture: tokens by layer, classes, time, and the line that gives it.

    pip install -r spaces/demo/requirements.txt    # or, in a checkout: pip install -e ".[demo]"
    python spaces/demo/app.py                      # then open http://127.0.0.1:7860

Without network it runs on the built-in model, a ViT that reads handwritten digits. DEMO_FOLDER says where that is:
the output of `make quickstart`, whose adapter is then offered, too. Where there is none, it is trained at the first
use, which takes a minute or two.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image

from dtem_hf import MergeAdapter, MergeConfig, attach
from dtem_hf.configuration import MatchingConfig
from dtem_hf.labels import multiply_adds_unit
from dtem_hf.models.auto import load_trained_classifier
from dtem_hf.models.copies import share_weights
from dtem_hf.models.install import merged_layers
from dtem_hf.models.timing import time_interleaved
from dtem_hf.opening import load_processor, open_image


try:
    import gradio as gr
    import sklearn

    from dtem_hf.quickstart import QuickstartArguments, train_backbone, write_digits
    from dtem_hf.report.pictures import panels_of
except ImportError as error:
    raise SystemExit(f'Error: {error}. The demo needs: pip install "dtem-hf[demo]"') from None


FOLDER = Path(os.environ.get("DEMO_FOLDER", "runs/quickstart"))
DIGITS, ADAPTER = str(FOLDER / "vit"), FOLDER / "merge" / "adapter"
BUILT_IN = "handwritten digits (built in)"
MODELS = [BUILT_IN, "facebook/deit-tiny-patch16-224", "facebook/deit-small-patch16-224", "google/vit-base-patch16-224"]
LEARNED = "a trained adapter"
# The methods that need no training and merge r tokens in every layer.
CONFIGS = {
    config.title: config
    for _, config in sorted(MergeConfig._methods.items(), reverse=True)
    if issubclass(config, MatchingConfig) and not config.learns
}
_training = Lock()
CSS = """
.gradio-container { max-width: 1100px !important; margin: auto }
#layers .grid-container { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important }
#layers .grid-wrap { max-height: none !important; height: auto !important }
#figures th { white-space: nowrap }
#figures th, #figures td { padding: 0.3rem !important; font-size: 0.9rem }
#plain h2, #merged h2 { font-size: 1.2rem !important; padding: 1.5rem 0 0.5rem !important }
#plain, #merged, #code, #plain *, #merged * { min-width: 0 !important }
"""
INTRO = """# Token merging
`dtem_hf` merges similar tokens between the layers of a vision transformer. Each outlined area below is one token.
"""


def samples() -> list[str]:
    """A few digits of the built-in model, and scikit-learn's two photographs."""
    digits = sorted((FOLDER / "digits" / "test").glob("*.png"))[:4]
    return [str(path) for path in (*digits, *sorted(Path(sklearn.__path__[0], "datasets", "images").glob("*.jpg")))]


@lru_cache(maxsize=2)
def load(name: str) -> tuple[Any, Any]:
    """A classifier without merging, and its image processor."""
    return load_trained_classifier(name, merge=None).eval(), load_processor(name)


def train_built_in() -> None:
    """Train the built-in model, unless it is there."""
    with _training:
        if not Path(DIGITS, "preprocessor_config.json").is_file():  # the last file that is written
            gr.Info("The built-in model is trained first, once. This takes a minute or two.", duration=None)
            train_backbone(FOLDER, QuickstartArguments(output_dir=str(FOLDER)))


def picked(file: str) -> Image.Image:
    """The uploaded picture, as every program of dtem_hf opens it."""
    try:
        return open_image(file, Path(file).name)
    except ValueError as error:
        raise gr.Error(str(error).replace(f"{Path(file).parent}{os.sep}", "")) from error


def compare(
    picture: Image.Image | None,
    model_name: str,
    method: str,
    adapter: str,
    r: int,
    progress: Any = gr.Progress(track_tqdm=True),  # noqa: B008 (so the page finds it)
) -> tuple[Any, ...]:
    """Run a picture through the plain and the merged model: the two lists of classes, figures, the line, layers."""
    if picture is None:
        raise gr.Error("Upload a picture, or take a sample.")
    try:
        return compared(picture, model_name.strip(), method, adapter.strip(), int(r))
    except (ValueError, OSError, ImportError) as error:
        raise gr.Error(str(error)) from error


@torch.inference_mode()
def compared(picture: Image.Image, model_name: str, method: str, adapter: str, r: int) -> tuple[Any, ...]:
    """As `compare`. Raises what dtem_hf raises."""
    name = DIGITS if model_name == BUILT_IN else model_name
    if model_name == BUILT_IN:
        with torch.inference_mode(False):
            train_built_in()
    plain, processor = load(name)
    merge: Any = MergeAdapter.from_reference(adapter) if method == LEARNED else CONFIGS[method](r=r)
    merged = attach(share_weights(plain), merge).eval()
    merged.set_reduction(r)
    pixels = processor(images=picture, return_tensors="pt").pixel_values
    classes = [top(model, pixels) for model in (plain, merged)]
    runs = [lambda model=model: model(pixels) for model in (plain, merged)]
    seconds = np.median(time_interleaved(runs, pixels.device, rounds=5, warmup=1, batch_size=1), axis=0)
    plan, depth = merged.merge_plan(), len(merged_layers(merged))
    (seen, _), panels = panels_of(picture, merged, processor, list(range(depth)))
    pictures = [(as_picture(panel), f"layer {i}: {text.split('→ ')[1]}") for i, (panel, text) in enumerate(panels, 1)]
    return (*classes, table(plan, seconds), line(name, method, adapter, r), [(as_picture(seen), "input"), *pictures])


def top(model: Any, pixels: torch.Tensor) -> dict[str, float]:
    """The five most likely classes with their probabilities."""
    values, ids = model(pixels).logits[0].softmax(-1).topk(min(5, model.config.num_labels))
    return {model.config.id2label[int(i)].split(",")[0]: float(value) for value, i in zip(values, ids, strict=True)}


def table(plan: Any, seconds: Any) -> str:
    """Time and multiply-adds, without and with merging, and their ratio."""
    factor, unit = multiply_adds_unit(plan.unmerged_multiply_adds)
    rows = [
        ("tokens, CLS included", plan.num_tokens, plan.tokens[-1], f"{plan.tokens[-1] / plan.num_tokens:.2f}"),
        (
            f"{unit} multiply-adds",
            f"{plan.unmerged_multiply_adds / factor:.2f}",
            f"{plan.multiply_adds / factor:.2f}",
            f"{plan.ratio:.2f}",
        ),
        ("ms here", *(f"{1000 * each:.1f}" for each in seconds), f"{seconds[1] / seconds[0]:.2f}"),
    ]
    lines = ["| | plain | merged | ratio |", "| --- | ---: | ---: | ---: |"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def line(name: str, method: str, adapter: str, r: int) -> str:
    """Python that gives the merged model."""
    config = "" if method == LEARNED else CONFIGS[method].__name__
    given = repr(adapter) if method == LEARNED else f"{config}(r={r})"
    names = ", ".join(filter(None, ["AutoModelForImageClassification", config]))
    code = f"from dtem_hf import {names}\n\nmodel = AutoModelForImageClassification.from_pretrained(\n"
    code += f"    {name!r}, merge={given}\n)"
    return f"{code}\nmodel.set_reduction({r})" if method == LEARNED else code


def as_picture(pixels: Any) -> Image.Image:
    """[H, W, 3] in 0..1 as a picture."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def page() -> gr.Blocks:
    """The page: what to merge on the left, what comes of it on the right, layers below."""
    with gr.Blocks(title="Token merging", analytics_enabled=False) as blocks:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column():
                picture = gr.Image(type="pil", format="png", label="Picture", interactive=False, height=260)
                upload = gr.UploadButton("Upload a picture", file_types=["image"], elem_id="upload")
                gr.Examples(samples(), picture, label="Samples", examples_per_page=6)
                model = gr.Dropdown(
                    MODELS, label="Model", info="built in, a local folder or a Hub id", allow_custom_value=True
                )
                methods = [*CONFIGS, LEARNED]
                method = gr.Radio(methods, value=methods[0], label="Method")
                adapter = gr.Textbox(
                    str(ADAPTER) if ADAPTER.is_dir() else "",
                    label="Adapter",
                    info="local folder or Hub id",
                    visible=False,
                )
                r = gr.Slider(0, 50, value=8, step=1, label="r", info="tokens merged in each layer", elem_id="r")
                button = gr.Button("Compare", variant="primary", elem_id="compare")
            with gr.Column():
                with gr.Row():
                    plain = gr.Label(label="Plain", num_top_classes=5, elem_id="plain", min_width=140)
                    merged = gr.Label(label="Merged", num_top_classes=5, elem_id="merged", min_width=140)
                figures = gr.Markdown(elem_id="figures")
                code = gr.Code(language="python", label="The same in Python", elem_id="code", wrap_lines=True)
        gr.Markdown("### Tokens behind each layer")
        layers = gr.Gallery(show_label=False, elem_id="layers", height="auto", format="png")
        inputs, outputs = [picture, model, method, adapter, r], [plain, merged, figures, code, layers]
        upload.upload(picked, upload, picture)
        method.change(lambda chosen: gr.Textbox(visible=chosen == LEARNED), method, adapter)
        for event in (button.click, r.release, picture.change):
            event(compare, inputs, outputs, trigger_mode="always_last")
    return blocks


if __name__ == "__main__":
    if not (FOLDER / "digits" / "test").is_dir():
        write_digits(FOLDER / "digits")
    page().launch(css=CSS, show_error=True, allowed_paths=[sklearn.__path__[0], str(FOLDER)])
