"""How a backbone is loaded or wrapped: the ways that `tests/models/test_loading.py` tests and a page documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def in_memory(auto: Any, folder: Path, scratch: Path) -> Any:
    return auto.from_pretrained(folder)


def on_disk(auto: Any, folder: Path, scratch: Path) -> Any:
    return auto.from_pretrained(folder, device_map={"vit": "disk", "classifier": "cpu"}, offload_folder=scratch)


def device_map(auto: Any, folder: Path, scratch: Path) -> Any:
    model = auto.from_pretrained(folder, device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=scratch)
    assert any(parameter.is_meta for parameter in model.parameters()), "nothing was offloaded"
    return model


def offloaded(auto: Any, folder: Path, scratch: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(auto.from_pretrained(folder), execution_device=torch.device("cpu"))


def lora(auto: Any, folder: Path, scratch: Path) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    return get_peft_model(auto.from_pretrained(folder), config).eval()


def eight_bits(auto: Any, folder: Path, scratch: Path) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return auto.from_pretrained(folder, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))


def four_bits(auto: Any, folder: Path, scratch: Path) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    return auto.from_pretrained(folder, quantization_config=config)


def torchao_config(auto: Any, folder: Path, scratch: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return auto.from_pretrained(folder, quantization_config=config)


def torchao_after(auto: Any, folder: Path, scratch: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = auto.from_pretrained(folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto(auto: Any, folder: Path, scratch: Path) -> Any:
    library = pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model = auto.from_pretrained(folder)
    library.quantize(model, weights=library.qint8)
    library.freeze(model)
    return model


def dynamic(auto: Any, folder: Path, scratch: Path) -> Any:
    return torch.ao.quantization.quantize_dynamic(auto.from_pretrained(folder), {torch.nn.Linear})


def sharded(auto: Any, folder: Path, scratch: Path) -> Any:
    return shard(auto.from_pretrained(folder))


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.vit.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_saved_embedding(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["merge_embedding"])).eval()


@dataclass(frozen=True)
class Way:
    """`load` takes an Auto class, a folder and one for scratch; `wrap` is applied when something is attached.

    `quantised`: the backbone is no longer the one in the checkpoint. `rounds_inputs`: nor are its projections affine.
    `grouped`: it needs a process group. `refused` says of what cannot be attached how the error begins.
    """

    title: str
    load: Callable[[Any, Path, Path], Any] = in_memory
    wrap: Callable[[Any], Any] = lambda model: model
    quantised: bool = False
    rounds_inputs: bool = False
    grouped: bool = False
    with_lora: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)


SHARDED = "The model's weights are sharded. Attach before you shard"
WAYS = {
    "plain": Way("plain"),
    "on_disk": Way("`device_map` with the encoder on disk", on_disk),
    "device_map": Way('`device_map="auto"`, `max_memory`', device_map),
    "offloaded": Way("`accelerate.cpu_offload`", offloaded),
    "eight_bits": Way("bitsandbytes, 8 bits", eight_bits, quantised=True, rounds_inputs=True),
    "four_bits": Way("bitsandbytes, 4 bits", four_bits, quantised=True),
    "torchao_config": Way("`TorchAoConfig`, int8", torchao_config, quantised=True),
    "torchao_after": Way("torchao `quantize_`, int8", torchao_after, quantised=True),
    "quanto": Way("optimum-quanto, int8", quanto, quantised=True),
    "dynamic": Way("`quantize_dynamic`", dynamic, quantised=True, rounds_inputs=True),
    "lora": Way("LoRA", lora, with_lora=True, quantised=True),
    "modules_to_save": Way(
        'then LoRA with `modules_to_save=["merge_embedding"]`',
        wrap=with_saved_embedding,
        with_lora=True,
    ),
    "fsdp_before": Way(
        "FSDP2's `fully_shard`", sharded, grouped=True, refused=dict.fromkeys(["dtem", "adapter"], SHARDED)
    ),
    "fsdp_after": Way("then FSDP2's `fully_shard`", wrap=shard, grouped=True),
    "ddp": Way("then `DistributedDataParallel`", wrap=DistributedDataParallel, grouped=True),
}
COLUMNS = {"tome": "ToMe", "dtem": "DTEM", "adapter": "adapter with powers and lengths"}
PREFACE = """
## However the backbone was loaded

`tests/models/test_loading.py` tests every cell: what a merged model computes, its plan, r = 0, `detach`, and that
learned parameters come back. Where a row begins with "then", the model is merged first.
"""


def document() -> str:
    """What can be attached to a backbone that was loaded in each way, in Markdown."""
    notes: dict[str, int] = {}

    def note(text: str, reason: str) -> str:
        return f"{text} [{notes.setdefault(reason, len(notes) + 1)}]"

    def cell(way: Way, column: str) -> str:
        if column in way.refused:
            return note("refused", f'"{way.refused[column]}"')
        if way.rounds_inputs and column == "dtem":
            return note("exact", ROUNDED)
        return note("exact", OWN) if way.quantised else "exact"

    rows = [["backbone", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    rows += [[way.title, *(cell(way, column) for column in COLUMNS)] for way in WAYS.values()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([PREFACE, table, "", *(f"[{number}] {reason}.  " for reason, number in notes.items())]) + "\n"


OWN = (
    "of the backbone as it is then: r = 0 and `detach` give its own bits, and what was learned is never quantised or "
    "adapted along"
)
ROUNDED = f"{OWN}; an untrained embedding is within 2 % of the mean keys, as these modules round their inputs, too"
