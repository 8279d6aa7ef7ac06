"""Adapter folders that are damaged or hostile: each is read as a sound adapter or refused.

The mutants are read by another process, which may not take more memory than a bound, and whose audit hook sees every
file that is opened and every program that is started.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.children import run_python


MUTANTS = 2000
SEED = 20250101
MEMORY = 256 << 20  # bytes of address space beyond what the process has when it begins
NAMES = ("merge_config.json", "merge_adapter.safetensors")
Files = dict[str, bytes]

HOSTILE = [
    *("/etc/passwd", "../../outside", "file:///etc/passwd", "~/.ssh/id_rsa", "\\\\host\\share", "..", "/dev/zero"),
    *("__reduce__", "os.system('touch pwned')", "{{7*7}}", "\x00", "\x1b[2J", "\ud800", "a" * 5000, "", "-1", "NaN"),
    *(None, True, False, [], {}, [[]], 0, -1, 1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), [1, 2, 3, 4], [16] * 4, [-1], ["x"], {"kind": "linear", "r": 2}, {"kind": "x"}),
    *({"kind": "flops", "flops": 0.5}, {"kind": "flops", "flops": 1e400}, {"kind": ["linear"]}, {"r": {"r": {}}}),
]


def sound_folder() -> Files:
    """An adapter for 2 layers of width 8, by the format's description alone."""
    config = {
        **{"method": "dtem", "version": "1.0", "proportional_attention": True, "r": 3, "embed_dim": None, "top_k": 3},
        **{"score_temperature": 0.1, "assignment_temperature": 0.1, "init": "keys", "relaxation": "auto"},
        "backbone": {"model_type": "vit", "num_layers": 2, "hidden_size": 8, "base_model": "me/base"},
    }
    config["backbone"]["base_revision"] = "0" * 40  # type: ignore[index]
    config["tensors_sha256"] = None
    shapes = {f"layers.{i}.{part}": shape for i in range(2) for part, shape in (("weight", [4, 8]), ("bias", [4]))}
    return {NAMES[0]: json.dumps(config).encode(), NAMES[1]: safetensors(shapes, lambda i: i / 7)}


def safetensors(shapes: dict[str, list[int]], value: Callable[[int], float] = float) -> bytes:
    header, numbers = {}, 0
    for name, shape in shapes.items():
        count = 1
        for extent in shape:
            count *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [4 * numbers, 4 * (numbers + count)]}
        numbers += count
    return with_header(header, b"".join(struct.pack("<f", value(i)) for i in range(numbers)))


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def split(content: bytes) -> tuple[Any, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length].decode()), content[8 + length :]


def config_of(files: Files) -> Any:
    return json.loads(files[NAMES[0]].decode())


def truncate(files: Files, draw: random.Random) -> None:
    name = draw.choice(NAMES)
    files[name] = files[name][: draw.randrange(len(files[name]))]


def flip_bits(files: Files, draw: random.Random) -> None:
    name = draw.choice(NAMES)
    content = bytearray(files[name])
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    files[name] = bytes(content)


def splice(files: Files, draw: random.Random) -> None:
    """Cut a piece out, repeat it, or put noise in."""
    name = draw.choice(NAMES)
    content = files[name]
    start, end = sorted(draw.randrange(len(content)) for _ in range(2))
    middle = draw.choice((b"", content[start:end] * 2, draw.randbytes(draw.randrange(200))))
    files[name] = content[:start] + middle + content[end:]


def exchange(files: Files, draw: random.Random) -> None:
    """A file that is none of the kind: a pickle, a zip, nothing, the other file."""
    pickle = b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x0btouch pwned\x85R."
    others = (pickle, b"PK\x03\x04" + pickle, b"", b"\x00" * 5000, b"{}", b"null", files[NAMES[0]], files[NAMES[1]])
    files[draw.choice(NAMES)] = draw.choice(others)


def remove(files: Files, draw: random.Random) -> None:
    del files[draw.choice(NAMES)]


def change_config(files: Files, draw: random.Random) -> None:
    """Any value, anywhere, may become anything."""
    config = config_of(files)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place = draw.choice((config, config, config.get("backbone")))
        if isinstance(place, dict) and place:
            place[draw.choice(sorted(place))] = copy.deepcopy(draw.choice(HOSTILE))
    files[NAMES[0]] = json.dumps(config).encode(errors="surrogatepass")


def change_keys(files: Files, draw: random.Random) -> None:
    """Rename, lose or add a key of the config."""
    config = config_of(files)
    place = draw.choice((config, config["backbone"]))
    key = draw.choice(sorted(place))
    name = str(draw.choice([*HOSTILE[:17], "auto_map", "trust_remote_code", "backbone", "method", "path", "layers"]))
    draw.choice(
        (lambda: place.update({name: place.pop(key)}), lambda: place.pop(key), lambda: place.update({name: 1}))
    )()
    files[NAMES[0]] = json.dumps(config).encode(errors="surrogatepass")


def change_version(files: Files, draw: random.Random) -> None:
    config = config_of(files)
    config["version"] = draw.choice(
        ("1.0", "1.7", "2.0", "0.9", "99999.99999", "1.0.0", "x", "1." + "9" * 9000, 1.0, [1])
    )
    files[NAMES[0]] = json.dumps(config).encode()


def huge_json(files: Files, draw: random.Random) -> None:
    """Long, wide, deep."""
    size = draw.choice((100, 5000, 90_000, 600_000))
    text = draw.choice(
        (
            "[" * size,
            "[" * size + "]" * size,
            '{"a":' * min(size, 90_000) + "1" + "}" * min(size, 90_000),
            json.dumps({**config_of(files), "r": [1] * size}),
            json.dumps({**config_of(files), **{f"key{i}": i for i in range(size // 10)}}),
            json.dumps({**config_of(files), "note": "x" * size}),
            "1" * size,
            " " * 2 * size + "{}",
        )
    )
    files[NAMES[0]] = text.encode()


def change_header(files: Files, draw: random.Random) -> None:
    """Names, shapes, types and offsets of tensors."""
    header, data = split(files[NAMES[1]])
    key = draw.choice(sorted(header))
    numbers = (-1, 0, 1, 3, 5, 7, 9, 2**20, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 1.5, None, "4")
    new = draw.choice(("__metadata__", "layers.9.bias", "../x", "layers.0.weight ", "", "weight", "x" * 4000))
    dtypes = ("F16", "F64", "I64", "BF16", "BOOL", "F8_E4M3", "f32", 32, None)
    changes: list[Callable[[], Any]] = [
        lambda: header.update({new: header.pop(key)}),
        lambda: header.update({new: header[key]}),
        lambda: header.pop(key),
        lambda: header[key].update(shape=[draw.choice(numbers) for _ in range(draw.randrange(5))]),
        lambda: header[key].update(shape=[2**16] * 4),
        lambda: header[key].update(dtype=draw.choice(dtypes)),
        lambda: header[key].update(data_offsets=[draw.choice(numbers) for _ in range(draw.choice((1, 2, 2, 2, 3)))]),
        lambda: header.update(__metadata__=draw.choice(({"format": "pt"}, {"a": 1}, "x", {"x": "y" * 9000}))),
        lambda: header[key].pop(draw.choice(sorted(header[key]))),
    ]
    draw.choice(changes)()
    files[NAMES[1]] = with_header(header, data)


def header_length(files: Files, draw: random.Random) -> None:
    length = draw.choice((0, 1, 7, 100, 2**20, 2**20 + 1, 10**8, 2**31, 2**62, 2**63, 2**64 - 1))
    files[NAMES[1]] = struct.pack("<Q", length) + files[NAMES[1]][8:]


def absurd_shapes(files: Files, draw: random.Random) -> None:
    """Config and header agree on numbers, and the data is not there, or too much."""
    config = config_of(files)
    layers, width, hidden = draw.choice(
        ((2, 4, 2**20), (4096, 4, 8), (2, 2**20, 2**20), (1, 1, 1), (3, 4, 8), (2, 0, 8), (2, 4, 0), (64, 2, 8))
    )
    config["backbone"].update(num_layers=layers, hidden_size=hidden)
    files[NAMES[0]] = json.dumps(config).encode()
    shapes = {f"layers.{i}.weight": [width, hidden] for i in range(layers)}
    shapes |= {f"layers.{i}.bias": [width] for i in range(layers)}
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    small = sum(width * (hidden + 1) for _ in range(layers)) < 10_000
    files[NAMES[1]] = safetensors(shapes) if small else with_header(header, b"\x00" * draw.randrange(4000))


def bad_numbers(files: Files, draw: random.Random) -> None:
    header, data = split(files[NAMES[1]])
    at = 4 * draw.randrange(len(data) // 4)
    number = struct.pack("<f", draw.choice((float("nan"), float("inf"), float("-inf"), 3.4e38, 1e-45)))
    files[NAMES[1]] = with_header(header, data[:at] + number + data[at + 4 :])


MUTATIONS = (
    *(truncate, flip_bits, flip_bits, splice, exchange, remove, change_config, change_config, change_config),
    *(change_keys, change_version, huge_json, change_header, change_header, header_length, absurd_shapes, bad_numbers),
)


def mutant(number: int) -> tuple[str, Files]:
    """The mutant of a number, and how it came about."""
    draw = random.Random(SEED + number)
    files, steps = sound_folder(), []
    for _ in range(draw.choice((1, 1, 1, 2))):
        mutation = draw.choice(MUTATIONS)
        try:
            mutation(files, draw)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError, struct.error):
            continue  # the first left nothing for the second
        steps.append(mutation.__name__)
    return "+".join(steps), files


def read_all(folder: Path) -> dict[str, Any]:
    """Read every mutant, in the process that is watched: how often what came out, and what should not have."""
    import resource
    import warnings

    import torch

    from dtem_hf import AdapterError, MergeAdapter

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = folder / "adapter"
    place.mkdir()
    write(place, sound_folder())
    assert MergeAdapter.from_pretrained(place).embed_dim == 4  # and everything that is imported late is imported
    seen = watch(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    allowed = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: dict[str, int] = {}
    wrong: list[str] = []
    for number in range(MUTANTS):
        how, files = mutant(number)
        write(place, files)
        try:
            adapter = MergeAdapter.from_pretrained(place)
            outcome = "sound"
            if fault := unsound(adapter):
                wrong.append(f"{number} ({how}): {fault}")
        except (AdapterError, FileNotFoundError) as error:
            outcome = type(error).__name__
            if len(str(error)) > 2000 or not str(error).isprintable():
                wrong.append(f"{number} ({how}): {str(error)[:300]!r}")
        except BaseException as error:
            outcome = "something else"
            wrong.append(f"{number} ({how}): {type(error).__name__}: {str(error)[:300]}")
        counts[outcome] = counts.get(outcome, 0) + 1
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"counts": counts, "wrong": wrong[:20], "grown": grown, "seen": sorted(seen)}


def write(place: Path, files: Files) -> None:
    for name in NAMES:
        (place / name).unlink(missing_ok=True)
        if name in files:
            (place / name).write_bytes(files[name])


def unsound(adapter: Any) -> str | None:
    """What is wrong with an adapter that was read; the format's promises, one by one."""
    facts, tensors = adapter.backbone, adapter.tensors
    wanted = {f"layers.{i}.{part}" for i in range(facts.num_layers) for part in ("weight", "bias")}
    if set(tensors) != wanted:
        return "names"
    width = tensors["layers.0.bias"].shape[0]
    for name, tensor in tensors.items():
        shape = (width, facts.hidden_size) if name.endswith("weight") else (width,)
        if tuple(tensor.shape) != shape or str(tensor.dtype) != "torch.float32" or not tensor.isfinite().all():
            return f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
    if getattr(adapter.config, "embed_dim", None) not in (None, width) or width < 1:
        return f"embed_dim {adapter.config.embed_dim} and width {width}"
    adapter.config.check()
    json.dumps(adapter.config.to_dict(), allow_nan=False)
    return None


def watch(folder: Path) -> set[str]:
    """From now on, note every file opened outside the folder, every file written, and every program started."""
    seen: set[str] = set()
    inside = str(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, flags = os.fsdecode(arguments[0]), arguments[2]
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not path.startswith(inside) and not path.startswith("/proc/self/"):
                seen.add(f"open {path}" + (" to write" if writes else ""))
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "import"):
            seen.add(f"{event} {arguments[0]}")
        elif event in ("exec", "compile", "pickle.find_class", "marshal.loads"):
            seen.add(event)

    sys.addaudithook(hook)
    return seen


def test_every_mutant_is_sound_or_refused_within_bounds(tmp_path: Path) -> None:
    script = "import json, sys, tests.hub.test_adapter_fuzz as t; print(json.dumps(t.read_all(t.Path(sys.argv[1]))))"
    done = run_python(["-c", script, tmp_path], cwd=tmp_path, check=True)
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert sum(result["counts"].values()) == MUTANTS >= 2000
    # Neither all refused nor all read: the mutants are at the edge.
    assert result["counts"]["sound"] > 100 and result["counts"]["AdapterError"] > 1000, result["counts"]
    assert result["grown"] < MEMORY / 2
    assert result["seen"] == []
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} <= set(NAMES)


@pytest.mark.parametrize("mutation", sorted(set(MUTATIONS), key=lambda mutation: mutation.__name__))
def test_every_mutation_does_something(mutation: Callable[[Files, random.Random], None]) -> None:
    changed = 0
    for seed in range(20):
        files = sound_folder()
        mutation(files, random.Random(seed))
        changed += files != sound_folder()
    assert changed > 10
