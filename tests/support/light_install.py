"""Run by `test_dependencies.py`: what a light install can do, in a process that has none of the packages it is given.

python tests/support/light_install.py MODEL FOLDER accelerate datasets ...
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from typing import Any


def main(model_name: str, folder: str, *absent: str) -> None:
    """Merge, save, load and push; then print what refuses to be imported or run, and why."""
    for module in absent:
        sys.modules[module] = None  # type: ignore[assignment]
    import torch

    import dtem_hf

    auto = dtem_hf.AutoModelForImageClassification
    pixels = torch.randn(2, 3, 32, 32)
    model = auto.from_pretrained(model_name, merge=dtem_hf.DTEMConfig(r=3))
    with torch.inference_mode():
        expected = model(pixels).logits
        plain = auto.from_pretrained(model_name)
        model.save_merge_adapter(f"{folder}/adapter")
        model.save_pretrained(f"{folder}/whole")
        model.push_merge_adapter("me/light")
        for again in (
            dtem_hf.attach(auto.from_pretrained(model_name), f"{folder}/adapter"),
            auto.from_pretrained(f"{folder}/whole"),
            auto.from_pretrained(model_name, merge="me/light"),
        ):
            assert torch.equal(again(pixels).logits, expected)
        assert torch.equal(dtem_hf.detach(model)(pixels).logits, plain(pixels).logits)

    refused: dict[str, str] = {}

    def attempt(name: str, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except ImportError as error:
            refused[name] = str(error)

    for module in pkgutil.walk_packages(dtem_hf.__path__, "dtem_hf.", onerror=lambda name: None):
        if module.name not in ("dtem_hf.opening", "dtem_hf.quickstart", "dtem_hf.ops.triton_kernels"):
            attempt(module.name, importlib.import_module, module.name)
    for name in dtem_hf.__all__:
        attempt(f"dtem_hf.{name}", getattr, dtem_hf, name)
    from typer.testing import CliRunner

    from dtem_hf import cli
    from dtem_hf.programs import PROGRAMS

    for name in PROGRAMS:
        result = CliRunner().invoke(cli.app, [name])
        assert result.exit_code == 1, result.output
        refused[f"dtem-hf {name}"] = result.stderr
    planned = CliRunner().invoke(cli.app, ["plan", model_name, "--method", "tome", "--r", "2"])
    assert planned.exit_code == 0, planned.output
    print(json.dumps({"refused": refused, "imported": [name for name in absent if sys.modules.get(name)]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
