"""How a merge is written into an exported graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from ..errors import BadValue


MERGE_FORMS = ("scatter", "one_hot", "openvino")
_FORM: ContextVar[str] = ContextVar("dtem_hf_merge_form", default="scatter")


@contextmanager
def merge_form(form: str) -> Iterator[None]:
    """Choose the operations that `torch.export` writes for matching and merging inside the block.

    "scatter" adds the merged tokens in place. "one_hot" multiplies by the one-hot matrix of the matching, for runtimes
    that cannot scatter with a sum (TensorRT) or do it slowly. "openvino" scatters, too, and uses sorts and sums that
    OpenVINO runs fast and exactly. Other passes do not change. Raises ValueError for another form.
    """
    if form not in MERGE_FORMS:
        raise BadValue("merge_form", form, f"one of {', '.join(MERGE_FORMS)}")
    before = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(before)


def exports_one_hot() -> bool:
    """Whether the graph that is being exported must hold no scatter."""
    return _exports("one_hot")


def exports_openvino() -> bool:
    """Whether a graph is being exported for OpenVINO.

    OpenVINO's TopK is unstable or slow, and its sum over heads is slower than additions.
    """
    return _exports("openvino")


def _exports(form: str) -> bool:
    # Dynamo cannot read the ContextVar, and never exports a form.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting and _FORM.get() == form
