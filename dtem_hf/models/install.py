"""Put merging into a model in memory, and take it out again.

A merged model keeps its modules and parameters. The modules' classes become subclasses of the same names (see
`derived.py`), and the learned embedding is one more child of the encoder. `detach` restores the classes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..configuration import LEARN_FIELDS, MergeConfig
from ..costs import LayerCost, MetricCost
from ..embedding import DecoupledEmbedding, Shifts
from ..errors import BadValue, UnsupportedModelError
from ..families import Place, find_encoder, find_place
from ..families.containers import container_of, states_read
from ..families.family import input_like
from ..families.layer import forget_keys, remember_keys
from ..families.readers import NEED_ALL
from ..families.shifts import Shiftable, Shifted, shiftable_parameters
from ..families.unmasked_attention import enable_size_bias
from ..hub.adapter import MergeAdapter
from ..hub.facts import BackboneFacts
from ..methods import Method, make_method
from ..schedule import ConstantSchedule, ListSchedule
from ..token_state import MergeStep, TokenState
from .derived import DerivedMixin, derive_class, restore_class
from .encoder import EncoderMerging, Merging, embedding_of, pass_options


MergeLike = MergeConfig | MergeAdapter | str | os.PathLike[str] | None


def resolve_merge(merge: Any, **hub_kwargs: Any) -> tuple[MergeConfig | None, MergeAdapter | None]:
    """Read a value of `merge`: a config, an adapter, its Hub id (`user/repo[@revision]`) or folder, or None."""
    if merge is None or isinstance(merge, MergeConfig):
        return merge, None
    if isinstance(merge, (str, os.PathLike)):
        _check_reference(os.fspath(merge))
        merge = MergeAdapter.from_reference(merge, **hub_kwargs)
    if isinstance(merge, MergeAdapter):
        return merge.config, merge
    if isinstance(merge, dict):
        return MergeConfig.from_dict(merge), None
    example = f"ToMeConfig(r={merge})" if type(merge) is int else "ToMeConfig()"
    raise BadValue("merge", merge, f"a config such as {example}, a MergeAdapter, a Hub id, a folder, or None")


def _check_reference(name: str) -> None:
    """Raise BadValue for a name that is neither a folder nor a Hub id, before the Hub is asked."""
    if "/" not in name and not os.path.isdir(name):
        config = MergeConfig._methods.get(name.lower())
        wanted = "a folder that exists, a Hub id (user/repo), or a config such as ToMeConfig()"
        raise BadValue("merge", name, wanted if config is None else f"for this method, write {config.__name__}()")


def prepare(
    model: PreTrainedModel, config: MergeConfig, adapter: MergeAdapter | None = None
) -> tuple[Place, Merging, DecoupledEmbedding | None]:
    """Make and check everything that `install` will add to a model; the model itself does not change yet.

    Returns the place, the merging, and the embedding, with the adapter's values if one is given. Raises
    UnsupportedModelError or ValueError if the merge does not fit. On the meta device, where `from_pretrained` builds a
    model before it loads the weights, the embedding has no values.
    """
    place = find_place(model, config.part)
    family, holder, encoder = place.family, place.holder, place.encoder
    config = replace(config, part=place.part or None)  # a checked copy; loading finds the part by its name
    enable_size_bias(encoder.config._attn_implementation)
    family.check(holder, encoder)
    layers = family.layers(encoder)
    if len(set(layers)) < len(layers):
        raise UnsupportedModelError(f"{type(encoder).__name__}: some of its layers are one module; copy it for each.")
    if adapter is not None:
        adapter.check_fits(backbone_facts(model, place=place))
    geometry = replace(family.geometry(encoder), shiftable=shiftable_parameters(family.shiftable(encoder)))
    method = make_method(config, geometry)
    method.check(type(encoder).__name__)
    merging = _merging(model, place, method)
    shape = method.embedding_shape()
    if shape is not None and shape.shifts:
        _check_shiftable(family.shiftable(encoder))
    if shape is not None and any(isinstance(p, DTensor) for p in encoder.parameters()):
        raise UnsupportedModelError(
            "The model's weights are sharded. Attach before you shard: an embedding that is attached now would be in "
            "no shard, and the processes would not share its gradients."
        )
    # In a thread of its own: OpenMP's threads end with the thread that started them. A server that loads a model and
    # then forks its workers must not keep such threads, or the workers cannot compute.
    with ThreadPoolExecutor(1) as short_lived:
        inference = torch.is_inference_mode_enabled()
        embedding = short_lived.submit(_make_embedding, encoder, merging, adapter, inference).result()
    return place, merging, embedding


def _check_shiftable(modules: Sequence[Shiftable]) -> None:
    """Raise UnsupportedModelError if a module is of a class whose parameters cannot be shifted."""
    for name, module, mixin in modules:
        if mixin is None:
            raise UnsupportedModelError(
                f"learn_shifts=True: {name} is a {type(module).__name__}; only parameters of torch's own Linear and "
                "LayerNorm can be shifted. Load the model without quantisation, or use an adapter without shifts."
            )


def _merging(model: PreTrainedModel, place: Place, method: Method) -> Merging:
    """The `Merging` of a model by a method. Raises ValueError if the config's schedule does not fit."""
    family, encoder, config, geometry = place.family, place.encoder, method.config, method.geometry
    cost = family.encoder_cost(place.holder, encoder, method.metric_cost())
    cost = replace(cost, pairwise=method.pairwise, between=method.between)
    reader = _outer_reader(model, place, config)
    read: tuple[int, ...] = (geometry.num_layers,)
    if reader == "sized" and container_of(type(model)).counts_placeholders:
        read = tuple(range(geometry.num_layers + 1)[index] for index in states_read(model.config))
        unread = [LayerCost(0, 0, 0, MetricCost(0))] * (geometry.num_layers - max(read))
        cost = replace(cost, layers=(*cost.layers[: max(read)], *unread))
    reads_all = reader == "grid" or family.reader(type(place.holder)) in NEED_ALL
    if reads_all and config.unmerge is False:
        raise BadValue("unmerge", False, f"None or True: {type(model).__name__} reads all tokens, in place")
    return Merging(family, method, cost, family.num_tokens(encoder), reads_all, reader, read)


def _outer_reader(model: PreTrainedModel, place: Place, config: MergeConfig) -> str:
    """How a container reads the tokens of its part; "tokens" for a model of the family, which has no container."""
    if not place.part:
        return "tokens"
    container = container_of(type(model))
    return "sized" if config.unmerge is False and container.counts_placeholders else container.reader


def _make_embedding(
    encoder: Any, merging: Merging, adapter: MergeAdapter | None, inference: bool
) -> DecoupledEmbedding | None:
    method, family = merging.method, merging.family
    shape, like = method.embedding_shape(), input_like(encoder)
    with torch.inference_mode(inference):
        embedding = None if shape is None else DecoupledEmbedding(shape, like.device).to(like.dtype)
        if adapter is not None:
            adapter.load_into(embedding)
        elif embedding is not None and not like.is_meta:
            from_keys = getattr(merging.config, "init", "random") == "keys"
            keys = family.key_projections(encoder, like) if from_keys else []
            method.initialize(embedding, keys, getattr(encoder.config, "initializer_range", 0.02))
    return None if embedding is None else embedding.train(encoder.training)


def install(
    model: PreTrainedModel,
    place: Place,
    merging: Merging,
    embedding: DecoupledEmbedding | None,
    model_mixins: Sequence[type],
) -> None:
    """Put the results of `prepare` into a plain model; its class gets `model_mixins`, unless it has them already."""
    encoder = place.encoder
    if not is_merged(model):
        derive_class(model, *model_mixins)
    if place.part:
        holder_mixins = place.family.model_mixins(type(place.holder))
        if holder_mixins:
            derive_class(place.holder, *holder_mixins, DerivedMixin)
        for name, mixin in container_of(type(model)).parts.items():
            if name in dict(model.named_children()):
                derive_class(model.get_submodule(name), mixin, DerivedMixin)
    if not isinstance(encoder, EncoderMerging):
        derive_class(encoder, EncoderMerging)
    for index, layer in enumerate(merging.family.layers(encoder)):
        derive_class(layer, merging.family.layer_merging, DerivedMixin)
        layer.merge_index = index  # type: ignore[assignment]
        merging.family.anatomy.key_module(layer).register_forward_hook(remember_keys)
    for module, mixin in merging.family.parts(place.holder, encoder):
        derive_class(module, mixin, DerivedMixin)
    if embedding is not None:
        encoder.merge_embedding = embedding
        if embedding.shape.shifts:
            for name, shifting, kind in merging.family.shiftable(encoder):
                assert kind is not None  # checked by `prepare`
                derive_class(shifting, kind, DerivedMixin)
                shifting.merge_name = Shifts.key(*name.split("."))
    _set_merging(model, encoder, merging)


def _warn_of_an_r_that_is_too_large(merging: Merging) -> None:
    """Warn about an explicit r that no layer can merge; each layer lowers it to what it can merge."""
    schedule, patches = merging.config.schedule, merging.num_tokens - merging.cost.num_prefix_tokens
    written = isinstance(schedule, ConstantSchedule | ListSchedule) and schedule != type(merging.config)().schedule
    largest = max(schedule.resolve(merging.cost, merging.num_tokens), default=0)
    if written and merging.cost.pairwise and largest > patches // 2:
        warnings.warn(
            f"r={largest}: an image of the model's own size has {patches} patches, of which a layer can merge at most "
            f"half, {patches // 2}; each layer lowers r to what it can merge. set_reduction(flops=0.5) finds an r.",
            stacklevel=5,  # the caller of attach or set_reduction
        )


def _set_merging(model: Any, encoder: Any, merging: Merging) -> None:
    _warn_of_an_r_that_is_too_large(merging)
    encoder.merging = merging
    model.config.merge = merging.config.to_dict()


def detach(model: PreTrainedModel) -> Any:
    """Take merging out of a model and all its parts, and restore classes, config and state.

    A plain model does not change. Raises ValueError for what is no model, and for a part of a merged model: detach the
    whole model.
    """
    inner: Any = inside_peft(model)
    if not isinstance(inner, nn.Module):
        raise BadValue("model", type(inner).__name__, "a model of transformers")
    merged: list[Any] = [module for module in inner.modules() if is_merged(module)]
    if merged and not any(hasattr(type(module), "merge_config") for module in merged):
        raise BadValue("model", type(inner).__name__, "the whole merged model; this is a part of it")
    for module in merged:
        if is_installed(module):
            for layer in module.merging.family.layers(module):
                for part in layer.modules():  # PEFT may have wrapped the key projection since
                    forget_keys(part)
                vars(layer).pop("merge_index", None)  # a layer that replaced a merged one has none
            if embedding_of(module) is not None:
                del module.merge_embedding
            del module.merging
        if isinstance(module, Shifted):
            del module.merge_name
        if hasattr(getattr(module, "config", None), "merge"):
            del module.config.merge
        restore_class(module)
    return model


def is_merged(model: nn.Module) -> bool:
    """Whether a model is of a merged class."""
    return isinstance(model, DerivedMixin)


def is_installed(encoder: Any) -> bool:
    """Whether `install` has run for an encoder; the class alone may be a merged one before."""
    return "merging" in vars(encoder)


def inside_peft(model: Any) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper; any other model is returned unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def set_merge_config(model: Any, config: MergeConfig) -> None:
    """Replace the config of a merged model; the method and the learned embedding stay.

    Raises ValueError for another method, or a config that needs another embedding; the model does not change then.
    """
    place = find_place(model)
    merging = place.encoder.merging
    if config.method != merging.config.method:
        raise BadValue("method", config.method, f"{merging.config.method!r}, or attach another method")
    method = make_method(replace(config, part=place.part or None), merging.method.geometry)
    _check_shape(method, merging.method)
    same_reader = config.unmerge == merging.config.unmerge
    _set_merging(
        model, place.encoder, replace(merging, method=method) if same_reader else _merging(model, place, method)
    )


def _check_shape(method: Method, current: Method) -> None:
    """Raise ValueError if a method needs another embedding than the current one."""
    config, wanted, own = method.config, method.embedding_shape(), current.embedding_shape()
    if wanted is None or own is None or wanted == own:
        return
    if wanted.embed_dim != own.embed_dim:
        raise BadValue("embed_dim", wanted.embed_dim, f"{own.embed_dim}, the width of the learned embedding")
    if wanted.predictors != own.predictors:
        raise BadValue("layers", config.schedule, f"{own.predictors} layers: this is the number of learned predictors")
    parts = ("exponent_heads", "norms", "shifts")  # fields of the shape, in the order of LEARN_FIELDS
    pairs = zip(LEARN_FIELDS, parts, strict=True)
    name = next(name for name, part in pairs if getattr(wanted, part) != getattr(own, part))
    same = f"{not getattr(config, name)}, as in the learned embedding"
    raise BadValue(name, getattr(config, name), f"{same}; to learn another one, load with merge=None and attach")


def load_embedding(model: Any, adapter: MergeAdapter) -> None:
    """Replace the values of a merged model's embedding by an adapter's; the config stays. Raises ValueError."""
    adapter.check_fits(backbone_facts(model))
    adapter.load_into(embedding_of(find_encoder(model)[1]))


def merged_layers(model: Any) -> Sequence[nn.Module]:
    """The layers of a model's merged encoder, in order."""
    family, encoder = find_encoder(model)
    return family.layers(encoder)


def merging_of(model: Any) -> Merging:
    """The current `Merging` of a merged model."""
    return find_encoder(model)[1].merging


@contextmanager
def recorded_steps(model: Any) -> Iterator[list[MergeStep]]:
    """`with recorded_steps(model) as steps:` every layer that merges by matching appends its `MergeStep`."""
    steps: list[MergeStep] = []
    with pass_options(find_encoder(model)[1], steps=steps):
        yield steps


@contextmanager
def recorded_states(model: Any) -> Iterator[list[TokenState]]:
    """`with recorded_states(model) as states:` every merged pass appends its token state."""
    states: list[TokenState] = []
    with pass_options(find_encoder(model)[1], states=states):
        yield states


def backbone_facts(model: Any, base_model: str | None = None, place: Place | None = None) -> BackboneFacts:
    """The facts that an adapter records about its backbone, the encoder at `place` (None: the one that merges).

    The name of a local folder is left out: it has no meaning on other machines.
    """
    place = place or find_place(model)
    encoder, geometry = place.encoder, place.family.geometry(place.encoder)
    own = model.name_or_path
    # transformers calls a model that it made from a state dict "None".
    name = base_model or (None if own == "None" or os.path.exists(own) else own) or None
    return BackboneFacts(
        model_type=encoder.config.model_type,
        num_layers=geometry.num_layers,
        hidden_size=geometry.hidden_size,
        base_model=name,
        base_revision=getattr(model.config, "_commit_hash", None) if name == own else None,
    )
