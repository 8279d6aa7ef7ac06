"""The command line in this process, and the small model that its tests use."""

from __future__ import annotations

import json
from typing import Any

from transformers import ViTConfig
from typer.testing import CliRunner

from dtem_hf.cli import app


# 4 × 4 patches of 8 × 8 pixels and CLS: 17 tokens; width 16, two heads, an MLP of 32, five classes.
TINY = ViTConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    image_size=32,
    patch_size=8,
    num_labels=5,
)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: Any) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
