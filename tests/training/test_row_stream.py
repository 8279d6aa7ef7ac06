"""A stream gives every row once an epoch, in another order each time, over any number of processes, from anywhere."""

import io
import json
import tarfile
from itertools import chain

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from dtem_hf import BadValue
from dtem_hf.data.images import stream_images
from dtem_hf.training.row_stream import RowStream


ROWS, SHARDS = 39, 3


def picture(value):
    return Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8))


def write_parquet(folder):
    for shard in range(SHARDS):
        labels = list(range(shard, ROWS, SHARDS))
        rows = Dataset.from_dict({"image": [picture(label) for label in labels], "label": labels})
        rows.to_parquet(str(folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"), batch_size=5)


def write_webdataset(folder):
    for shard in range(SHARDS):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for label in range(shard, ROWS, SHARDS):
                png = io.BytesIO()
                picture(label).save(png, "png")
                for name, content in ((f"{label:03d}.png", png.getvalue()), (f"{label:03d}.cls", b"%d" % label)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module", params=[write_parquet, write_webdataset], ids=["parquet", "webdataset"])
def rows(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    request.param(folder)
    return stream_images(str(folder))


def labels(batches):
    return [[(epoch, number, row["label"]) for epoch, number, row in batch] for batch in batches]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_epoch_has_every_row_once_over_all_processes(rows, processes):
    streams = [RowStream(rows, 4, 40, 7, 10, rank, processes) for rank in range(processes)]
    items = list(chain.from_iterable(chain.from_iterable(labels(stream)) for stream in streams))
    epochs = [[label for epoch, _, label in items if epoch == number] for number in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(ROWS))
    assert epochs[0] != epochs[1]
    assert len({number for _, number, _ in items}) == len(items)  # or two images would be augmented alike


@pytest.mark.parametrize(("rank", "cut"), [(0, 3), (1, 7)])
def test_cut_anywhere_it_goes_on_as_it_would_have(rows, rank, cut):
    """Across the end of a block of 10 rows, and of an epoch."""
    whole = labels(RowStream(rows, 4, 12, 7, 10, rank, 2))
    began = RowStream(rows, 4, 12, 7, 10, rank, 2)
    for batch, _ in zip(range(cut + 2), began, strict=False):  # workers are handed batches ahead of their use
        assert batch < cut + 2
    position = json.loads(json.dumps(began.position_after(cut - 1)))
    assert labels(RowStream(rows, 4, 12 - cut, 7, 10, rank, 2, position)) == whole[cut:]


def test_rows_are_named(rows):
    stream = RowStream(rows, 4, 2, 7)
    (_, number, row), *_ = next(iter(stream))
    assert stream.name_of(number) == row.get("__key__", str(number))


def test_stream_without_rows_for_a_process_is_an_error(tmp_path):
    Dataset.from_dict({"image": [picture(1)], "label": [1]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(BadValue, match="images for each of 2 processes"):
        next(iter(RowStream(stream_images(str(tmp_path)), 1, 1, 0, rank=1, world_size=2)))


def test_a_stream_of_no_batches_ends(rows):
    """A finished run that is started again has none left."""
    assert list(RowStream(rows, 4, 0, 7)) == []
