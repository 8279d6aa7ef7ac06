"""How a merge is written into an exported graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from packaging.version import Version

from ..errors import BadValue


def _is_exporting_without_dynamo() -> bool:
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


# Whether torch.export traces. In torch before 2.13, Dynamo takes the answer to be yes in every graph of torch.compile.
_DYNAMO_KNOWS = Version(torch.__version__) >= Version("2.13")
is_exporting = torch.compiler.is_exporting if _DYNAMO_KNOWS else _is_exporting_without_dynamo

MERGE_FORMS = ("torch", "scatter", "one_hot", "openvino")
_FORM: ContextVar[str] = ContextVar("dtem_hf_merge_form", default="torch")


@contextmanager
def merge_form(form: str) -> Iterator[None]:
    """Choose the operations that `torch.export` writes for matching and merging inside the block.

    "torch", the default, orders equal scores as eager does, wherever the graph runs. "scatter" and "one_hot" leave
    that order to ONNX's TopK. "one_hot" multiplies by the one-hot matrix of the matching, for runtimes that cannot
    scatter with a sum (TensorRT) or do it slowly; the other forms scatter. "openvino" orders as "torch" does, and uses
    maxima and sums that OpenVINO runs fast and exactly. Other passes stay. Raises ValueError for another form.
    """
    if form not in MERGE_FORMS:
        raise BadValue("merge_form", form, f"one of {', '.join(MERGE_FORMS)}")
    before = _FORM.set(form)
    try:
        yield
    finally:
        _FORM.reset(before)


def exports(*forms: str) -> bool:
    """Whether a graph is being exported in one of these forms.

    Only ONNX's TopK, of the forms "scatter" and "one_hot", keeps the order of equal values; OpenVINO's is unstable or
    slow. OpenVINO also adds faster than it sums over heads.
    """
    # Dynamo cannot read the ContextVar, and never exports a form.
    return _is_exporting_without_dynamo() and _FORM.get() in forms
