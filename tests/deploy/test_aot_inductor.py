"""AOTInductor packages: compiled ahead, for any batch, in float32 and bfloat16."""

import shutil

import pytest
import torch

from dtem_hf.deploy.aot_inductor import PackageRunner
from dtem_hf.deploy.program import ExportArguments, export, load_for_export


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++ on a CPU, and there is no g++")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# Neither the C++ nor its compiler does what makes it fast, and headers that are compiled ahead take longer than two
# packages with them.
@torch._inductor.config.patch(
    {"aot_inductor.debug_compile": True, "aot_inductor.precompile_headers": False, "cpp.simdlen": 1}
)
def test_a_package_for_any_batch(one_layer_vit_folder, tmp_path, dtype):
    settings = {"model": str(one_layer_vit_folder), "method": "tome", "r": "3", "dtype": dtype, "device": "cpu"}
    arguments = ExportArguments(**settings, formats=["aot_inductor"], output_dir=str(tmp_path))
    (record,) = export(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "model.pt2.json"]
    assert record["parity"]["batches"] == [1, 2, 5]
    model = load_for_export(arguments).to(getattr(torch, dtype)).eval()
    run = PackageRunner(tmp_path / "model.pt2")
    for count in (1, 9):
        pixels = torch.randn(count, 3, 32, 32)
        (found,) = run(pixels)
        assert found.dtype == torch.float32
        if dtype == "float32":
            torch.testing.assert_close(found, model(pixels).logits, atol=1e-5, rtol=1e-5)
        else:
            assert found.isfinite().all()
