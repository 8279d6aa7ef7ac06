"""A server that loads a merged model and then forks its workers: they compute, as they do with the plain model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

from dtem_hf import DTEMConfig, attach
from tests.support.children import run_python


SERVER = """
import os, sys, time
import torch
import dtem_hf

torch.set_num_threads(2)
folder, adapter = sys.argv[1:]
learned = {"learn_exponents": True, "learn_norms": True}
merges = {
    "plain": None, "tome": dtem_hf.ToMeConfig(r=13), "dtem": dtem_hf.DTEMConfig(r=13, **learned), "adapter": adapter
}
for way, merge in merges.items():
    for dtype in (torch.float32, torch.bfloat16):
        model = dtem_hf.AutoModelForImageClassification.from_pretrained(folder, merge=merge, dtype=dtype)
        worker = os.fork()
        if not worker:
            with torch.no_grad():
                finite = model(torch.zeros(2, 3, 224, 224, dtype=dtype)).logits.isfinite().all()
            os._exit(0 if finite else 1)
        end = time.monotonic() + 30
        ended, status = os.waitpid(worker, os.WNOHANG)
        while not ended and time.monotonic() < end:
            time.sleep(0.01)
            ended, status = os.waitpid(worker, os.WNOHANG)
        print(way, dtype, "answers" if ended and status == 0 else "hangs", flush=True)
        if not ended:
            os.kill(worker, 9)
            os.waitpid(worker, 0)
"""


def test_workers_that_are_forked_after_loading_answer(tmp_path: Path) -> None:
    """The sizes are DeiT-base's, which torch computes with several threads."""
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 768, "num_hidden_layers": 2}
    model = ViTForImageClassification(ViTConfig(**sizes))
    model.save_pretrained(tmp_path / "plain")
    model = attach(model, DTEMConfig(r=13, learn_exponents=True, learn_norms=True))
    model.save_merge_adapter(tmp_path / "adapter")
    server = run_python(["-c", SERVER, tmp_path / "plain", tmp_path / "adapter"], check=True)
    dtypes = (torch.float32, torch.bfloat16)
    expected = [f"{way} {dtype} answers" for way in ("plain", "tome", "dtem", "adapter") for dtype in dtypes]
    assert server.stdout.splitlines() == expected
