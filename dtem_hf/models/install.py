"""Put merging into a model that is in memory, and take it out again.

A merged model keeps its modules and its parameters; their classes become subclasses that bear the same names (recorded
outputs, device maps and checkpoints go by name), and the learned embedding is one more child of the encoder. `detach`
gives the classes back.
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
from ..families import Family, Place, find_encoder, find_place, input_like, serve_attention
from ..families.containers import container_of, states_read
from ..families.layer import forget_keys, remember_keys
from ..families.shifts import Shifted, shiftable_modules, shiftable_parameters
from ..hub.adapter import MergeAdapter
from ..hub.facts import BackboneFacts
from ..methods import Method, make_method
from ..schedule import ConstantSchedule, ListSchedule
from ..token_state import MergeStep, TokenState
from .derived import Renamed, derive_class, restore_class
from .encoder import EncoderMerging, Merging, embedding_of, pass_options


MergeLike = MergeConfig | MergeAdapter | str | os.PathLike[str] | None


def resolve_merge(merge: Any, **hub_kwargs: Any) -> tuple[MergeConfig | None, MergeAdapter | None]:
    """Read what `merge` may be: a config, an adapter, an adapter's Hub id (`user/repo[@revision]`) or folder, None."""
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
        wanted = "a folder that is there, a Hub id (user/repo), or a config such as ToMeConfig()"
        raise BadValue("merge", name, wanted if config is None else f"for this method, write {config.__name__}()")


def prepare(
    model: PreTrainedModel, config: MergeConfig, adapter: MergeAdapter | None = None
) -> tuple[Place, Merging, DecoupledEmbedding | None]:
    """Make and check what attaching a config, and an adapter's embedding, adds to a model, which stays as it is.

    Raises UnsupportedModelError and ValueError where it does not fit. On the meta device, where `from_pretrained`
    builds a model before it loads it, the embedding stays without values.
    """
    place = find_place(model, config.part)
    family, holder, encoder = place.family, place.holder, place.encoder
    config = _own(config, place)
    serve_attention(encoder.config._attn_implementation)
    family.check(holder, encoder)
    layers = family.layers(encoder)
    if len(set(layers)) < len(layers):
        raise UnsupportedModelError(f"{type(encoder).__name__}: some of its layers are one module; copy it for each.")
    if adapter is not None:
        adapter.check_fits(backbone_facts(model, place=place))
    geometry = replace(family.geometry(encoder), shiftable=shiftable_parameters(family, encoder))
    method = make_method(config, geometry)
    method.check(type(encoder).__name__)
    merging = _merging(model, place, config, method)
    shape = method.embedding_shape()
    if shape is not None and shape.shifts:
        _check_shiftable(family, encoder)
    if shape is not None and any(isinstance(p, DTensor) for p in encoder.parameters()):
        raise UnsupportedModelError(
            "The model's weights are sharded. Attach first and shard then: an embedding that is attached now would be "
            "no part of any shard, and processes would not share its gradients."
        )
    # OpenMP's threads end with the thread that started them. A process that keeps some cannot compute once forked,
    # as servers are that load a model and then start their workers.
    with ThreadPoolExecutor(1) as short_lived:
        inference = torch.is_inference_mode_enabled()
        embedding = short_lived.submit(_make_embedding, encoder, merging, adapter, inference).result()
    return place, merging, embedding


def _check_shiftable(family: Family, encoder: nn.Module) -> None:
    """Raise UnsupportedModelError where a module is of a kind whose parameters cannot move."""
    for name, module, mixin in shiftable_modules(family, encoder):
        if mixin is None:
            raise UnsupportedModelError(
                f"learn_shifts=True: {name} is a {type(module).__name__}, and only parameters of torch's own Linear "
                "and LayerNorm can move. Load the model without quantisation, or take an adapter without shifts."
            )


def _own(config: MergeConfig, place: Place) -> MergeConfig:
    """A copy, checked again: the caller may change theirs. It names the part, which loading must find again."""
    return replace(config, part=place.part or None)


def _merging(model: PreTrainedModel, place: Place, config: MergeConfig, method: Method[Any]) -> Merging:
    """How a model is merged by a config. Raises ValueError where its schedule does not fit."""
    family, encoder, geometry = place.family, place.encoder, method.geometry
    cost = family.encoder_cost(place.holder, encoder, method.metric_cost())
    cost = replace(cost, pairwise=method.pairwise, between=method.between)
    reader = _outer_reader(model, place, config)
    read: tuple[int, ...] = (geometry.num_layers,)
    if reader == "sized" and container_of(type(model)).counts_placeholders:
        read = tuple(range(geometry.num_layers + 1)[index] for index in states_read(model.config))
        unread = [LayerCost(0, 0, 0, MetricCost(0))] * (geometry.num_layers - max(read))
        cost = replace(cost, layers=(*cost.layers[: max(read)], *unread))
    reads_all = reader == "grid" or family.reads_grid(place.holder)
    if reads_all and config.unmerge is False:
        raise BadValue("unmerge", False, f"None or True: {type(model).__name__} reads all tokens, in place")
    return Merging(config, family, geometry, method, cost, family.num_tokens(encoder), reads_all, reader, read)


def _outer_reader(model: PreTrainedModel, place: Place, config: MergeConfig) -> str:
    """The word for how a container reads the tokens of its part; "tokens" where the model is of the family."""
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
    """Put what was prepared into a plain model. `model_mixins` go in front of the model's class, if not there yet."""
    encoder = place.encoder
    if not is_merged(model):
        derive_class(model, *model_mixins)
    if place.part:
        holder_mixins = place.family.model_mixins(type(place.holder))
        if holder_mixins:
            derive_class(place.holder, *holder_mixins, Renamed)
        for name, mixin in container_of(type(model)).parts.items():
            if name in dict(model.named_children()):
                derive_class(model.get_submodule(name), mixin, Renamed)
    if not isinstance(encoder, EncoderMerging):
        derive_class(encoder, EncoderMerging)
    for index, layer in enumerate(merging.family.layers(encoder)):
        derive_class(layer, merging.family.layer_merging, Renamed)
        layer.merge_index = index  # type: ignore[assignment]
        merging.family.anatomy.key_module(layer).register_forward_hook(remember_keys)
    for module, mixin in merging.family.parts(place.holder, encoder):
        derive_class(module, mixin, Renamed)
    if embedding is not None:
        encoder.merge_embedding = embedding
        if embedding.shape.shifts:
            for name, shifting, kind in shiftable_modules(merging.family, encoder):
                assert kind is not None  # `prepare` has checked
                derive_class(shifting, kind, Renamed)
                shifting.merge_name = Shifts.key(*name.split("."))
    _set_merging(model, encoder, merging)


def _warn_of_an_r_that_is_too_large(merging: Merging) -> None:
    """An r that was written down is lowered where a layer has too few tokens; no layer can merge the one warned of."""
    schedule, patches = merging.config.schedule, merging.num_tokens - merging.cost.num_prefix_tokens
    written = isinstance(schedule, ConstantSchedule | ListSchedule) and schedule != type(merging.config)().schedule
    largest = max(schedule.resolve(merging.cost, merging.num_tokens), default=0)
    if written and merging.cost.pairwise and largest > patches // 2:
        warnings.warn(
            f"r={largest}: an image of the model's own size has {patches} patches, of which a layer can merge half, "
            f"{patches // 2}, at most; r is lowered to that, layer by layer. set_reduction(flops=0.5) finds an r.",
            stacklevel=5,  # who called attach or set_reduction
        )


def _set_merging(model: Any, encoder: Any, merging: Merging) -> None:
    _warn_of_an_r_that_is_too_large(merging)
    encoder.merging = merging
    model.config.merge = merging.config.to_dict()


def detach(model: PreTrainedModel) -> Any:
    """Take merging out of a model and all its parts: classes, config and state are what they were.

    A plain model stays as it is. Raises ValueError for what is no model, and for a part of a model that is merged.
    """
    inner: Any = inside_peft(model)
    if not isinstance(inner, nn.Module):
        raise BadValue("model", type(inner).__name__, "a model of transformers")
    merged: list[Any] = [module for module in inner.modules() if is_merged(module)]
    if merged and not any(hasattr(type(module), "merge_config") for module in merged):
        raise BadValue("model", type(inner).__name__, "the merged model that this is a part of")
    for module in merged:
        if is_installed(module):
            for layer in module.merging.family.layers(module):
                for part in layer.modules():  # PEFT may have wrapped the key projection since
                    forget_keys(part)
                del layer.merge_index
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
    return isinstance(model, Renamed)


def is_installed(encoder: Any) -> bool:
    """Whether an encoder merges; a model of a merged class does not before `install` has run."""
    return "merging" in vars(encoder)


def inside_peft(model: Any) -> PreTrainedModel:
    """The transformers model inside PEFT's wrapper; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def set_merge_config(model: Any, config: MergeConfig) -> None:
    """Replace the config of a merged model; method and learned embedding stay.

    Raises ValueError for another method, and where the embedding would have another shape; nothing is changed then.
    """
    place = find_place(model)
    config, merging = _own(config, place), place.encoder.merging
    if config.method != merging.config.method:
        raise BadValue("method", config.method, f"{merging.config.method!r}, or attach another method")
    _check_shape(config, merging)
    if config.unmerge == merging.config.unmerge:
        changed = replace(merging, config=config)
    else:
        changed = _merging(model, place, config, merging.method)
    merging.method.config = config
    _set_merging(model, place.encoder, changed)


def _check_shape(config: MergeConfig, merging: Merging) -> None:
    wanted, own = make_method(config, merging.geometry).embedding_shape(), merging.method.embedding_shape()
    if wanted is None or own is None or wanted == own:
        return
    if wanted.embed_dim != own.embed_dim:
        raise BadValue("embed_dim", wanted.embed_dim, f"{own.embed_dim}, the width of the learned embedding")
    if wanted.predictors != own.predictors:
        raise BadValue("layers", config.schedule, f"{own.predictors} layers, as many as have learned scores")
    parts = ("exponent_heads", "norms", "shifts")  # of an embedding, for each of the fields
    pairs = zip(LEARN_FIELDS, parts, strict=True)
    name = next(name for name, part in pairs if getattr(wanted, part) != getattr(own, part))
    same = f"{not getattr(config, name)}, as the embedding was learned"
    raise BadValue(name, getattr(config, name), f"{same}; to learn another one, load with merge=None and attach")


def load_embedding(model: Any, adapter: MergeAdapter) -> None:
    """Put an adapter's embedding in the place of a merged model's own; its config stays. Raises ValueError."""
    adapter.check_fits(backbone_facts(model))
    adapter.load_into(embedding_of(find_encoder(model)[1]))


def merged_layers(model: Any) -> Sequence[nn.Module]:
    """The encoder layers in which a model merges, in order."""
    family, encoder = find_encoder(model)
    return family.layers(encoder)


def merging_of(model: Any) -> Merging:
    """How a merged model is merged at present."""
    return find_encoder(model)[1].merging


@contextmanager
def recorded_steps(model: Any) -> Iterator[list[MergeStep]]:
    """`with recorded_steps(model) as steps:` appends what every layer that merges by matching chose from."""
    steps: list[MergeStep] = []
    with pass_options(find_encoder(model)[1], steps=steps):
        yield steps


@contextmanager
def recorded_states(model: Any) -> Iterator[list[TokenState]]:
    """`with recorded_states(model) as states:` appends the token state of every merged pass."""
    states: list[TokenState] = []
    with pass_options(find_encoder(model)[1], states=states):
        yield states


def backbone_facts(model: Any, base_model: str | None = None, place: Place | None = None) -> BackboneFacts:
    """What an adapter records of a backbone, which is where the model merges, or at `place`.

    The name of a local folder is left out: it means nothing elsewhere.
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
