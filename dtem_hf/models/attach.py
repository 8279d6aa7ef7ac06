"""The methods of merged models (`MergeMixin`), and `attach`, which merges a model in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..configuration import MergeConfig
from ..costs import MergePlan
from ..errors import BadValue
from ..families import SUPPORTED, find_encoder, find_family, find_place
from ..families.containers import container_of
from ..families.readers import RETURN_ALL
from ..families.unmasked_attention import enable_size_bias
from ..hub.adapter import MergeAdapter
from ..hub.client import cached_commit
from ..schedule import FlopsSchedule
from ..token_state import MergeTrace
from .derived import DerivedMixin, derived_class, restore_class, stock_class
from .encoder import EncoderMerging, embedding_of, pass_options
from .install import (
    MergeLike,
    backbone_facts,
    detach,
    inside_peft,
    install,
    is_installed,
    merging_of,
    prepare,
    resolve_merge,
    set_merge_config,
)
from .speedup import share_for_speedup


EMBEDDING_KEYS = r"(^|\.)merge_embedding\."
# The arguments of a model's `from_pretrained` that also apply to reading an adapter.
ADAPTER_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
# Stands for "not given", where None means "without merging".
UNSET: Any = type("Unset", (), {"__repr__": lambda self: "UNSET"})()


class MergeMixin(DerivedMixin):
    """The methods that a merged model has beside those of its own class."""

    def __init__(self, config: PretrainedConfig, *args: Any, merge_config: MergeConfig | None = UNSET, **kwargs: Any):
        """Merge as `config.merge` says, so that the model has an embedding to load the checkpoint's tensors into.

        With None or a `merge_config` of another method, make the plain model; `from_pretrained` attaches the merge
        when the weights are loaded.
        """
        # Taken first: a model may build the one inside from the same config, by an Auto class that is registered.
        own = getattr(config, "__dict__", {}).pop("merge", None)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if merge_config is not UNSET:  # the checkpoint's embedding is not needed: no warning about its keys
            ignored = getattr(self, "_keys_to_ignore_on_load_unexpected", None) or ()
            self._keys_to_ignore_on_load_unexpected = {*ignored, EMBEDDING_KEYS}
        of_part = _take_record(self)
        recorded, _ = resolve_merge(of_part if own is None else own)
        same_method = isinstance(merge_config, MergeConfig) and merge_config.method == getattr(recorded, "method", "")
        if recorded is not None and (merge_config is UNSET or same_method):
            attach(self, recorded)  # type: ignore[arg-type]
        else:
            restore_class(self)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, merge: MergeLike = UNSET, **kwargs: Any
    ) -> Any:
        """transformers' `from_pretrained` with `merge`: a config, an adapter, its Hub id or folder, or None (plain).

        Without `merge`, the checkpoint's `config.merge` decides, and its learned embedding is loaded. Raises
        ValueError if the merge does not fit the model, and OSError if the checkpoint lacks the recorded embedding.
        """
        config = kwargs.get("config")
        if merge is UNSET and not isinstance(getattr(config, "merge", {}), dict):
            # transformers' own Auto classes write the value of merge= into the config, if that has a field `merge`.
            merge = config.merge  # type: ignore[union-attr]
        if merge is not UNSET:
            wanted, adapter = resolve_merge(merge, **{k: kwargs[k] for k in ADAPTER_ARGUMENTS if k in kwargs})
            merge = adapter or wanted
            # Without the adapter: transformers would copy its tensors with all threads (see `prepare`).
            kwargs["merge_config"] = wanted if adapter is None else None
            if merge is not None:
                enable_size_bias(kwargs.get("attn_implementation"))
        info_wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = sorted(key for key in info["missing_keys"] if "merge_embedding." in key)
        if missing:
            raise OSError(
                f"{pretrained_model_name_or_path}: its config records a merge with a learned embedding, and the "
                f"checkpoint does not hold it ({missing[0]} is missing). Pass merge='adapter' to load an adapter, or "
                "merge=None for the plain model; attach(model, DTEMConfig(...)) then starts from attention keys."
            )
        # Without a name, the weights are those in `state_dict`; transformers loads a PEFT adapter with its base model.
        is_own = str(pretrained_model_name_or_path) == model.name_or_path and pretrained_model_name_or_path is not None
        if is_own and getattr(model.config, "_commit_hash", None) is None:
            # Newer versions of transformers leave it out; adapters record it.
            model.config._commit_hash = cached_commit(
                os.fspath(pretrained_model_name_or_path), kwargs.get("revision"), kwargs.get("cache_dir")
            )
        if isinstance(merge, MergeConfig) and is_installed(find_place(model, merge.part).encoder):
            set_merge_config(model, merge)
        elif merge is not UNSET:
            attach(model, merge)
        return (model, info) if info_wanted else model

    @property
    def merge_config(self) -> MergeConfig:
        """A copy of the current config. Change it with `set_reduction` or `attach`."""
        return replace(merging_of(self).config)

    def set_reduction(
        self,
        r: Any = None,
        *,
        flops: float | None = None,
        target_speedup: float | None = None,
        batch_size: int = 16,
    ) -> None:
        """Change how much is merged. Give exactly one of `r`, `flops` and `target_speedup`.

        `r` is an int, a list with one per layer, or a schedule. `flops` is the share of the unmerged multiply-adds to
        reach. `target_speedup` is a speed-up over the unmerged model: a benchmark finds the share of multiply-adds
        that gives it, on the model's device, in eager mode, with batches of `batch_size` (about a minute on a CPU).
        Raises ValueError that names the value and what would fit; the model does not change then.
        """
        given = [value for value in (r, flops, target_speedup) if value is not None]
        if len(given) != 1:
            raise BadValue("r, flops, target_speedup", (r, flops, target_speedup), "exactly one of them")
        if target_speedup is not None:
            flops = share_for_speedup(self, target_speedup, batch_size)
        merging = merging_of(self)
        wanted = r if flops is None else FlopsSchedule(flops)
        set_merge_config(self, merging.config.with_reduction(wanted, merging.cost, merging.num_tokens))

    def merge_plan(self, image_size: int | tuple[int, int] | None = None) -> MergePlan:
        """Compute tokens per layer and multiply-adds per image, without running the model.

        `image_size` is in pixels; None: the model's own size.
        """
        place = find_place(self)  # type: ignore[arg-type]
        family, merging = place.family, place.encoder.merging
        plan = merging.plan if image_size is None else merging.plan_for(family.num_tokens(place.encoder, image_size))
        all_tokens = merging.unmerge or family.reader(type(place.holder)) in RETURN_ALL
        returned = plan.num_tokens if all_tokens else plan.tokens[-1]
        return replace(plan, output_tokens=returned * family.frames_of(place.holder))

    @contextmanager
    def trace_merging(self) -> Iterator[MergeTrace]:
        """`with model.trace_merging() as trace:` every pass of this thread fills the `MergeTrace` anew.

        A compiled model runs eagerly inside the block, with `fullgraph=True` not at all. An exported graph, which was
        made before, fills no trace.
        """
        trace = MergeTrace()
        with pass_options(find_encoder(self)[1], trace=trace):  # type: ignore[arg-type]
            yield trace

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Inside the block, and in this thread only, the model runs without merging.

        A compiled model runs eagerly inside the block, with `fullgraph=True` not at all. torch.export exports the
        plain model; a graph that was exported before does not change.
        """
        with pass_options(find_encoder(self)[1], merge=False):  # type: ignore[arg-type]
            yield

    def merge_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that modular training optimises; none if the method learns nothing."""
        embedding = embedding_of(find_encoder(self)[1])  # type: ignore[arg-type]
        return iter(()) if embedding is None else embedding.parameters()

    def to_merge_adapter(self, base_model: str | None = None) -> MergeAdapter:
        """The learned embedding as an adapter; `base_model` is the backbone's Hub id (None: the model's own name)."""
        embedding = embedding_of(find_encoder(self)[1])  # type: ignore[arg-type]
        return MergeAdapter.from_embedding(self.merge_config, embedding, backbone_facts(self, base_model))

    def save_merge_adapter(self, save_directory: str | os.PathLike[str], base_model: str | None = None) -> None:
        """Write the learned embedding as an adapter folder, without the backbone."""
        self.to_merge_adapter(base_model).save_pretrained(save_directory)

    def push_merge_adapter(self, repo_id: str, base_model: str | None = None, **kwargs: Any) -> str:
        """Publish the learned embedding; `kwargs` go to `MergeAdapter.push_to_hub`. Returns the commit's URL."""
        return self.to_merge_adapter(base_model).push_to_hub(repo_id, **kwargs)


def attach(model: PreTrainedModel, merge: MergeLike, *, unmerge: bool | None = None, part: str | None = None) -> Any:
    """Merge tokens in a model in memory, and return the same object; its new class has the same name.

    `merge` takes the values of `from_pretrained(merge=...)`; None detaches. `unmerge` overrides the config's field:
    True returns all tokens in place. If the model holds several encoders, `part` is the dotted name of the one to
    merge. An earlier merge, of any part, is replaced. In PEFT's `PeftModel`, the model inside is merged. Raises
    UnsupportedModelError for a model or an attention implementation that cannot be merged (and says which can be), and
    ValueError if the merge does not fit; the model does not change then.
    """
    inner = inside_peft(model)
    if not isinstance(inner, PreTrainedModel):
        raise BadValue("model", type(inner).__name__, "a transformers model; pass the model inside a wrapper")
    config, adapter = resolve_merge(merge)
    if config is None:
        return detach(model)
    if unmerge is not None:
        config = replace(config, unmerge=unmerge)
    if part is not None:
        config = replace(config, part=part)
    place, merging, embedding = prepare(inner, config, adapter)
    if [module for module in inner.modules() if "merging" in vars(module)]:
        detach(inner)
    install(inner, place, merging, embedding, _mixins(type(inner)))
    return model


def merged_class(model_class: type) -> type:
    """The merged class of a model class; its `from_pretrained` takes `merge`. Raises UnsupportedModelError."""
    stock = stock_class(model_class)
    return derived_class(stock, *_mixins(stock))


def _take_record(model: Any) -> Any:
    """Take the recorded merge out of the config of a part that was merged by itself."""
    record = None
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and hasattr(config, "merge"):
            if record is None and config.merge is not None:
                record = {**config.merge, "part": name}
            del config.merge
    return record


def _mixins(model_class: type) -> tuple[type, ...]:
    if not issubclass(model_class, SUPPORTED):  # a container
        return (MergeMixin, *container_of(model_class).mixins)
    family = find_family(model_class)
    encoder_mixins = (EncoderMerging,) if issubclass(model_class, tuple(family.encoders)) else ()
    return (MergeMixin, *encoder_mixins, *family.model_mixins(model_class))
