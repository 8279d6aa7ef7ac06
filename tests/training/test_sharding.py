"""A merged model under FSDP2 in two processes on a CPU: trained, saved, killed, resumed to the same bits.

Accelerate runs FSDP on accelerators alone: `fully_shard` and torch's own checkpoints stand here for a training.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from dtem_hf import MergeAdapter
from tests.support.children import start_together


PROGRAM = """
import os, signal, sys
import torch, transformers
import torch.distributed.checkpoint as checkpoints
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from dtem_hf import DTEMConfig, attach
from dtem_hf.models.install import merged_layers

folder, part = sys.argv[1:]
torch.distributed.init_process_group("gloo")
rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
shapes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}

def make():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**shapes, image_size=32, patch_size=4)
    model = attach(transformers.ViTForImageClassification(config).requires_grad_(False), DTEMConfig(r=4)).train()
    for layer in merged_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.Adam(list(model.merge_parameters()), lr=0.01)

def step(model, optimizer, seed):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(10 * seed + rank))
    model(pixel_values=pixels).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()

model, optimizer = make()
if part == "first":
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoints.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    step(model, optimizer, 2)
    os.kill(os.getpid(), signal.SIGKILL)
of_model, of_optimizer = get_state_dict(model, optimizer)
checkpoints.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
straight, its_optimizer = make()
for seed in range(4):
    step(straight, its_optimizer, seed)
    if seed >= 2:
        step(model, optimizer, seed)
pairs = zip(model.merge_parameters(), straight.merge_parameters(), strict=True)
same = all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)
adapter = model.to_merge_adapter()
if rank == 0:
    adapter.save_pretrained(folder + "-adapter")
full = [p.full_tensor() for p in model.merge_parameters()]
moved = not torch.equal(full[0], make()[0].merge_parameters().__next__().full_tensor())
if rank == 0:
    torch.save(full, folder + "-tensors.pt")
with open(f"{folder}-rank-{rank}.txt", "w") as file:  # a line that two processes print can be cut by the other's
    file.write(f"{same} {moved}")
"""


def test_a_killed_training_resumes_to_the_same_bits_and_its_adapter_holds_them(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    folder = str(tmp_path / "checkpoint")
    for part, code in (("first", -signal.SIGKILL), ("second", 0)):
        (tmp_path / part).mkdir()
        processes = start_together([tmp_path / "program.py", folder, part], 2, tmp_path / part, os.environ)
        assert [process.wait() for process in processes] == [code] * 2, processes[0].log.read_text()
    assert [Path(f"{folder}-rank-{rank}.txt").read_text() for rank in (0, 1)] == ["True True"] * 2
    kept = MergeAdapter.from_pretrained(folder + "-adapter").tensors
    trained = torch.load(folder + "-tensors.pt", weights_only=True)
    assert sorted(map(str, (t.shape for t in kept.values()))) == sorted(map(str, (t.shape for t in trained)))
    assert all(any(torch.equal(t, other) for other in kept.values()) for t in trained)
