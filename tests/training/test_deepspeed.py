"""What DeepSpeed's ZeRO-2 saves of a merged model comes back, in two processes on a CPU.

Accelerate runs DeepSpeed on accelerators alone, so that DeepSpeed's own engine stands here for a whole training.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: it is built for the machine that it runs on")

PROGRAM = """
import os, signal, sys
import deepspeed, torch, transformers
from dtem_hf import DTEMConfig, attach

deepspeed.init_distributed("gloo")
rank = torch.distributed.get_rank()
shapes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}

def make():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**shapes, image_size=32, patch_size=4)
    model = attach(transformers.ViTForImageClassification(config).requires_grad_(False), DTEMConfig(r=4)).train()
    adam = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}, "optimizer": adam}
    return deepspeed.initialize(model=model, model_parameters=list(model.merge_parameters()), config=config)[0]

def step(engine, seed):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed + rank))
    engine.backward(engine(pixel_values=pixels).logits.square().mean())
    engine.step()

def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.module.merge_parameters(), other.module.merge_parameters()))

folder, part = sys.argv[1:]
engine = make()
if part == "first":
    step(engine, 10)
    step(engine, 20)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    step(engine, 30)
    os.kill(os.getpid(), signal.SIGKILL)
straight = make()
engine.load_checkpoint(folder, load_module_strict=False)
for seed in (10, 20, 30, 40):
    step(straight, seed)
    if seed == 20:
        back = same(engine, straight)
    if seed > 20:
        step(engine, seed)
moved = not same(straight, make())
print(f"rank {rank}: {back} {same(engine, straight)} {moved}", flush=True)
"""


def test_a_killed_training_resumes_to_the_same_bits_without_the_backbone_in_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def run(part: str) -> subprocess.CompletedProcess[str]:
        words = [*command, str(tmp_path / "program.py"), str(tmp_path / "checkpoint"), part]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)

    assert run("first").returncode != 0
    done = run("second")
    assert {"rank 0: True True True", "rank 1: True True True"} <= set(done.stdout.splitlines()), done.stderr[-2000:]
