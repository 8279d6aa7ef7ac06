"""Options of a short run of the training program, and small models of every kind that it trains."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    GitConfig,
    GitForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from dtem_hf.training.small_git import make_tokenizer
from tests.support.training_processes import start_training, wait_for


COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220), "grey": (120, 120, 120)}
VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
    "initializer_factor": 4.0,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _streams_end_at_once(monkeypatch):
    """`datasets` sleeps for five seconds behind every stream that was read by threads."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)


@pytest.fixture
def options(vit_folder, image_folder, tmp_path):
    """Arguments of a run of a few steps."""
    return {
        "model": str(vit_folder),
        "data": str(image_folder),
        "output_dir": str(tmp_path / "run"),
        "r": "2",
        "steps": 6,
        "batch_size": 4,
        "validation_size": 8,
        "validate_every": 3,
        "checkpoint_every": 2,
        "num_workers": 0,
        "lr": 0.01,
    }


@pytest.fixture(scope="session")
def captioned_folder(tmp_path_factory):
    """24 images of two colours each, with a table of two captions for each."""
    folder = tmp_path_factory.mktemp("captioned")
    names, lines = list(COLOURS), ["image,caption"]
    for i in range(24):
        left, right = names[i % 4], names[(i // 4) % 4]
        pixels = np.empty((36, 40, 3), dtype=np.uint8)
        pixels[:, :20], pixels[:, 20:] = COLOURS[left], COLOURS[right]
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines += [f"{i}.png,{left} left of {right}", f'{i}.png,"it is {right}, with {left} on the left side of it"']
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def caption_options(options, captioned_folder):
    """Arguments of a short run on captions; the model is to be added."""
    return {**options, "data": str(captioned_folder), "captions": str(captioned_folder / "captions.txt")}


def _save(folder, model):
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    tokenizer = make_tokenizer([f"{a} left of {b} it is with on the side" for a in COLOURS for b in COLOURS], 80)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def git_folder(tmp_path_factory):
    """A GIT with random weights, its processor and its tokenizer."""
    torch.manual_seed(3)
    sizes = {**TEXT, "initializer_range": 0.2, "vocab_size": 80, "max_position_embeddings": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return _save(tmp_path_factory.mktemp("git"), GitForCausalLM(GitConfig(vision_config=VISION, **sizes, **special)))


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory):
    """A BLIP that writes captions, with random weights."""
    torch.manual_seed(3)
    text = {**TEXT, "vocab_size": 80, "max_position_embeddings": 32, "encoder_hidden_size": 32}
    special = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0, "label_smoothing": 0.0}
    config = BlipConfig(vision_config=VISION, text_config={**text, **special}, projection_dim=16)
    return _save(tmp_path_factory.mktemp("blip"), BlipForConditionalGeneration(config))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP with random weights."""
    torch.manual_seed(3)
    text = {**TEXT, "vocab_size": 80, "max_position_embeddings": 32, "initializer_factor": 4.0}
    config = CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16)
    return _save(tmp_path_factory.mktemp("clip"), CLIPModel(config))


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    """A SigLIP with random weights: no CLS token, a pooling head, texts of one length."""
    torch.manual_seed(3)
    text = {**TEXT, "vocab_size": 80, "max_position_embeddings": 16, "pad_token_id": 0, "projection_size": 32}
    return _save(tmp_path_factory.mktemp("siglip"), SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)))


@pytest.fixture
def make_run():
    """Makes a run that has not begun: its task, its model, and batches of its data."""
    from dtem_hf.training.arguments import TrainArguments
    from dtem_hf.training.run import Run

    return lambda options: Run(TrainArguments(**options))


@pytest.fixture
def start_processes(tmp_path):
    """Starts the training program in real processes that see each other; what they print is in `process.log`."""
    started = []

    def start(options, num_processes=1):
        new = start_training(options, num_processes, tmp_path / f"log-{len(started)}")
        started.extend(new)
        return new

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def finish_processes(start_processes):
    """Runs the training program to its end in real processes, and returns what each printed."""
    return lambda options, num_processes=1: wait_for(start_processes(options, num_processes))
