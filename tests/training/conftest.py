"""Options of a short run of the training program."""

import pytest


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
