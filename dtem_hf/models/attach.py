"""Put merging into a model that is in memory, and take it out again.

A merged model keeps its modules and its parameters; their classes become subclasses that bear the same names (recorded
outputs, device maps and checkpoints go by name), and the learned embedding is one more child of the encoder. `detach`
gives the classes back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import align_module_device
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..configuration import MergeConfig
from ..embedding import DecoupledEmbedding
from ..errors import BadValue
from ..families import Backbone, check_attention_implementation, find_backbone, find_family
from ..hub.adapter import BackboneFacts, MergeAdapter
from ..hub.client import cached_commit
from ..schedule import FlopsSchedule, MergePlan
from ..token_state import MergeStep, MergeTrace
from .derived import Renamed, change_class, derive_class, derived_class, restore_class
from .encoder import EncoderMerging, Merging, embedding_of, pass_options


EMBEDDING_KEYS = r"(^|\.)merge_embedding\."
# What `from_pretrained` of a model hands on to that of an adapter.
ADAPTER_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
MergeLike = MergeConfig | MergeAdapter | str | os.PathLike[str] | None
# Stands for "not given", where None means "without merging".
UNSET: Any = type("Unset", (), {"__repr__": lambda self: "UNSET"})()


class MergeMixin(Renamed):
    """What a merged model can do beside what its own class can."""

    def __init__(self, config: PretrainedConfig, *args: Any, merge_config: MergeLike = UNSET, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        given = merge_config is not UNSET
        # A base checkpoint has no embedding, and a plain model no place for one.
        self._ignore_on_load("_keys_to_ignore_on_load_missing", given)
        self._ignore_on_load("_keys_to_ignore_on_load_unexpected", True)
        saved, _ = resolve_merge(getattr(config, "merge", None))
        wanted, adapter = resolve_merge(merge_config) if given else (saved, None)
        if wanted is None:
            detach(self)  # type: ignore[arg-type]
            return
        prepared = _prepare(self, wanted)  # type: ignore[arg-type]
        if adapter is not None:
            # It brings an embedding of its own, which need not be as wide as one in the checkpoint.
            prepared = replace(prepared, embedding=None)
        elif saved is not None:
            _check_width(prepared, _prepare(self, saved))  # type: ignore[arg-type]
        _install(self, prepared)  # type: ignore[arg-type]

    def _ignore_on_load(self, name: str, ignore: bool) -> None:
        setattr(self, name, {*(getattr(self, name, None) or ()), *([EMBEDDING_KEYS] if ignore else [])})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, merge: MergeLike = UNSET, **kwargs: Any
    ) -> Any:
        """transformers' `from_pretrained` with `merge`: a config, an adapter, its Hub id or folder, or None for none.

        Left out, the checkpoint's own `config.merge` decides, and its learned embedding is loaded. Raises ValueError
        where the merge does not fit the model, OSError where a recorded embedding is not in the checkpoint.
        """
        config = kwargs.get("config")
        if merge is UNSET and not isinstance(getattr(config, "merge", {}), dict):
            # transformers' own Auto classes read merge= as a new value for the field of that name in a merged config.
            merge = config.merge  # type: ignore[union-attr]
        adapter: MergeAdapter | None = None
        if merge is not UNSET:
            options = {name: kwargs[name] for name in ADAPTER_ARGUMENTS if name in kwargs}
            merge_config, adapter = resolve_merge(merge, **options)
            if merge_config is not None:
                check_attention_implementation(kwargs.get("attn_implementation"))
            kwargs["merge_config"] = adapter or merge_config
        info_wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = sorted(key for key in info["missing_keys"] if "merge_embedding." in key)
        if missing:
            raise OSError(
                f"{pretrained_model_name_or_path}: its config records a merge with a learned embedding, and the "
                f"checkpoint does not hold it ({missing[0]} is missing). Pass merge=DTEMConfig(...) to start from "
                "keys, merge='adapter' to load an adapter, or merge=None for the plain model."
            )
        if getattr(model.config, "_commit_hash", None) is None:
            # Newer transformers leave it out; an adapter records it.
            model.config._commit_hash = cached_commit(
                os.fspath(pretrained_model_name_or_path), kwargs.get("revision"), kwargs.get("cache_dir")
            )
        embedding = embedding_of(_merged_encoder(model))
        if adapter is not None or (embedding is not None and not embedding.is_filled):
            attach(model, adapter or model.merge_config)
        return (model, info) if info_wanted else model

    @property
    def merge_config(self) -> MergeConfig:
        """The config in force."""
        return merging_of(self).config

    def set_reduction(
        self,
        r: Any = None,
        *,
        flops: float | None = None,
        target_speedup: float | None = None,
        batch_size: int = 16,
    ) -> None:
        """Change how much is merged: r (an int, one per layer, or a schedule), or the share of multiply-adds to reach.

        Or a speed-up over the unmerged model: it is measured, where the model is now and with batches of `batch_size`,
        which share of the multiply-adds gives it (eager; about a minute on a CPU), and that share is kept. Raises
        ValueError that names the value and what would fit; the model is unchanged then.
        """
        given = [value for value in (r, flops, target_speedup) if value is not None]
        if len(given) != 1:
            raise BadValue("r, flops, target_speedup", (r, flops, target_speedup), "exactly one of them")
        if target_speedup is not None:
            from .speedup import share_for_speedup  # which measures merged models

            if not 1 < target_speedup < float("inf"):
                raise BadValue("target_speedup", target_speedup, "a number above 1")
            flops = share_for_speedup(self, target_speedup, batch_size)
        merging = merging_of(self)
        wanted = r if flops is None else FlopsSchedule(flops)
        set_merge_config(self, merging.config.with_reduction(wanted, merging.cost, merging.plan.num_tokens))

    def merge_plan(self, image_size: int | tuple[int, int] | None = None) -> MergePlan:
        """Tokens per layer and multiply-adds per image for a size in pixels (None: the model's own), not run."""
        merging = merging_of(self)
        plan = merging.plan_for(merging.backbone.num_tokens(_merged_encoder(self), image_size))
        handed_on = plan.num_tokens if merging.unmerge else plan.tokens[-1]
        return replace(plan, output_tokens=handed_on * merging.backbone.frames(self))  # type: ignore[arg-type]

    @contextmanager
    def trace_merging(self) -> Iterator[MergeTrace]:
        """`with model.trace_merging() as trace:` fills a `MergeTrace` anew with every pass of this thread.

        A model compiled by torch.compile takes no notice: trace the model itself.
        """
        trace = MergeTrace()
        with pass_options(_merged_encoder(self), trace=trace):
            yield trace

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Inside the block, and in this thread only, the model runs as if nothing were attached.

        A model compiled by torch.compile takes no notice: run the model itself.
        """
        with pass_options(_merged_encoder(self), merge=False):
            yield

    def merge_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that modular training optimises; none where the method learns nothing."""
        embedding = embedding_of(_merged_encoder(self))
        return iter(()) if embedding is None else embedding.parameters()

    def to_merge_adapter(self, base_model: str | None = None) -> MergeAdapter:
        """The learned embedding as an adapter; `base_model` is its backbone's Hub id, if the model knows none."""
        encoder = _merged_encoder(self)
        return MergeAdapter.from_embedding(self.merge_config, embedding_of(encoder), _facts(self, base_model))

    def save_merge_adapter(self, save_directory: str | os.PathLike[str], base_model: str | None = None) -> None:
        """Write the learned embedding as an adapter folder, without the backbone."""
        self.to_merge_adapter(base_model).save_pretrained(save_directory)

    def push_merge_adapter(self, repo_id: str, base_model: str | None = None, **kwargs: Any) -> str:
        """Publish the learned embedding (keywords are `MergeAdapter.push_to_hub`'s). Returns the commit's URL."""
        return self.to_merge_adapter(base_model).push_to_hub(repo_id, **kwargs)


def resolve_merge(merge: Any, **hub_kwargs: Any) -> tuple[MergeConfig | None, MergeAdapter | None]:
    """Read what `merge` may be: a config, an adapter, an adapter's Hub id (`user/repo[@revision]`) or folder, None."""
    if merge is None or isinstance(merge, MergeConfig):
        return merge, None
    if isinstance(merge, (str, os.PathLike)):
        merge = MergeAdapter.from_reference(merge, **hub_kwargs)
    if isinstance(merge, MergeAdapter):
        return merge.config, merge
    if isinstance(merge, dict):
        return MergeConfig.from_dict(merge), None
    raise BadValue("merge", merge, "a config (DTEMConfig, ToMeConfig, …), a MergeAdapter, a Hub id, a folder, or None")


def attach(model: PreTrainedModel, merge: MergeLike, *, unmerge: bool | None = None) -> Any:
    """Merge tokens in a model that is in memory, and return it (the same object, under a class of the same name).

    `merge` is what `from_pretrained(merge=...)` takes; None detaches. `unmerge` overrides the config's field of that
    name: True hands all tokens on, in place. What was attached before is replaced. Of PEFT's `PeftModel` the model
    inside is merged. Raises UnsupportedModelError for a family or an attention backend that cannot be merged (and
    lists those that can), and ValueError where the merge does not fit; the model is unchanged then.
    """
    config, adapter = resolve_merge(merge)
    if config is None:
        return detach(model)
    if unmerge is not None:
        config = replace(config, unmerge=unmerge)
    inner = _inside(model)
    with _keys_at_hand(inner):
        prepared = _prepare(inner, config)
    if adapter is not None:
        adapter.check_fits(_facts(inner))
        adapter.load_into(prepared.embedding)
    detach(inner)
    _install(inner, prepared)
    return model


def load_embedding(model: Any, adapter: MergeAdapter) -> None:
    """Put an adapter's embedding in the place of a merged model's own; its config stays. Raises ValueError."""
    adapter.check_fits(_facts(model))
    adapter.load_into(embedding_of(_merged_encoder(model)))


def detach(model: PreTrainedModel) -> Any:
    """Take merging out of a model: classes, config and state are what they were. A plain model stays as it is."""
    inner = _inside(model)
    if not isinstance(inner, MergeMixin):
        return model
    backbone, encoder = find_backbone(inner)
    for layer in backbone.layers(encoder):
        for name in ("merge_index", "merge_reducer"):
            layer.__dict__.pop(name, None)
    if embedding_of(encoder) is not None:
        del encoder.merge_embedding
    encoder.__dict__.pop("merging", None)
    for module in inner.modules():
        restore_class(module)
    if hasattr(inner.config, "merge"):
        del inner.config.merge
    return model


def _inside(model: Any) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged_class(model_class: type) -> type:
    """The class of a merged model, whose `from_pretrained` takes `merge`. Raises UnsupportedModelError."""
    family = find_family(model_class)
    is_encoder, mixins = issubclass(model_class, family.encoder_class), family.model_mixins(model_class)
    return derived_class(model_class, MergeMixin, *((EncoderMerging,) if is_encoder else ()), *mixins)


@dataclass(frozen=True)
class _Prepared:
    """All that attaching adds to a model, made and checked before the model is touched."""

    backbone: Backbone
    encoder: Any
    merging: Merging
    embedding: DecoupledEmbedding | None


def _prepare(model: PreTrainedModel, config: MergeConfig) -> _Prepared:
    backbone, encoder = find_backbone(model)
    check_attention_implementation(encoder.config._attn_implementation)
    backbone.check(model, encoder)
    merging = Merging(model, encoder, backbone, config)
    shape = merging.reducer.embedding_shape(encoder)
    embedding = None
    if shape is not None:
        weight = backbone.key_projection(backbone.layers(encoder)[0]).weight
        embedding = DecoupledEmbedding(shape, weight.device).to(weight.dtype)
        # On the meta device from_pretrained is at work: it fills what the checkpoint lacks when the rest is loaded.
        if not weight.is_meta:
            merging.reducer.initialize(embedding, encoder)
        embedding.train(encoder.training)
    return _Prepared(backbone, encoder, merging, embedding)


def _check_width(wanted: _Prepared, saved: _Prepared) -> None:
    """The embedding in a checkpoint is kept under another config, and so must have the shape that one says."""
    if wanted.embedding is not None and saved.embedding is not None:
        shape, saved_shape = wanted.embedding.shape, saved.embedding.shape
        if shape.embed_dim != saved_shape.embed_dim:
            raise BadValue(
                "embed_dim",
                shape.embed_dim,
                f"the embedding in the checkpoint is {saved_shape.embed_dim} wide; give that width",
            )
        for name, own, there in (
            ("learn_exponents", bool(shape.exponent_heads), bool(saved_shape.exponent_heads)),
            ("learn_norms", shape.norms, saved_shape.norms),
        ):
            if own != there:
                raise BadValue(name, own, f"{there}, as the embedding in the checkpoint was learned")


def _install(model: PreTrainedModel, prepared: _Prepared) -> None:
    encoder: Any = prepared.encoder
    if not isinstance(model, MergeMixin):
        change_class(model, merged_class(type(model)))
    if not isinstance(encoder, EncoderMerging):
        derive_class(encoder, EncoderMerging)
    for index, layer in enumerate(prepared.backbone.layers(encoder)):
        derive_class(layer, prepared.backbone.layer_merging, Renamed)
        layer.merge_index = index  # type: ignore[assignment]
    for module, mixin in prepared.backbone.opened_parts(model, encoder):
        derive_class(module, mixin, Renamed)
    if prepared.embedding is not None:
        encoder.merge_embedding = prepared.embedding
    _set_merging(model, prepared.backbone, encoder, prepared.merging)


def _set_merging(model: PreTrainedModel, backbone: Backbone, encoder: Any, merging: Merging) -> None:
    for layer in backbone.layers(encoder):
        layer.merge_reducer = merging.reducer  # type: ignore[assignment]
    encoder.merging = merging
    model.config.merge = merging.config.to_dict()


@contextmanager
def _keys_at_hand(model: Any) -> Iterator[None]:
    """Have accelerate bring in key projections that it has offloaded, as it does when their modules run."""
    with ExitStack() as stack:
        backbone, encoder = find_backbone(model)
        for layer in backbone.layers(encoder):
            stack.enter_context(align_module_device(backbone.key_linear(layer)[0]))
        yield


def set_merge_config(model: Any, config: MergeConfig) -> None:
    """Replace the config of a merged model; the learned embedding stays."""
    backbone, encoder = find_backbone(model)
    _set_merging(model, backbone, encoder, Merging(model, encoder, backbone, config))


def merged_layers(model: Any) -> Sequence[nn.Module]:
    """The encoder layers in which a model merges, in order."""
    backbone, encoder = find_backbone(model)
    return backbone.layers(encoder)


@contextmanager
def recorded_steps(model: Any) -> Iterator[list[MergeStep]]:
    """`with recorded_steps(model) as steps:` appends what every layer that merges by matching chose from."""
    steps: list[MergeStep] = []
    with pass_options(_merged_encoder(model), steps=steps):
        yield steps


def _merged_encoder(model: Any) -> Any:
    return find_backbone(model)[1]


def merging_of(model: Any) -> Merging:
    """How a merged model is merged at present."""
    return _merged_encoder(model).merging


def _facts(model: Any, base_model: str | None = None) -> BackboneFacts:
    """What an adapter records of a backbone; the name of a local folder means nothing to anybody else."""
    backbone, encoder = find_backbone(model)
    layers = backbone.layers(encoder)
    name = base_model or (None if os.path.exists(model.name_or_path) else model.name_or_path) or None
    return BackboneFacts(
        model_type=encoder.config.model_type,
        num_layers=len(layers),
        hidden_size=backbone.key_projection(layers[0]).weight.shape[1],
        base_model=name,
        base_revision=getattr(model.config, "_commit_hash", None) if name == model.name_or_path else None,
    )
