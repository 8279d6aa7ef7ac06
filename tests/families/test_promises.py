"""The promises that need no reference, for every row of every family and every method: see DESIGN.md section 3.

That a merged model computes the right thing is in `test_slow_reference.py`.
"""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dtem_hf
from dtem_hf import DTEMConfig, DTPSConfig, ToMeConfig, UnsupportedModelError, attach, detach
from dtem_hf.families import find_encoder
from dtem_hf.training.parameters import relax
from tests.support import methods
from tests.support.ecosystem import autos_of
from tests.support.families import ROWS
from tests.support.family_case import Row
from tests.support.passes import MILD, gradients, merged, run, same_bits


METHODS = {name: case.config for name, case in methods.METHODS.items()}
UNEVEN = [11, 0, 14, 3]

every_row = pytest.mark.parametrize("row", ROWS, ids=str)
# ToMe and DTEM in every row. What another method does is the same code in every family: one of each kind shows it.
ROWS_AND_METHODS = [
    pytest.param(row, method, id=f"{row}-{method}")
    for row in ROWS
    for method, case in methods.METHODS.items()
    if case.fits(row) and (method in ("tome", "dtem") or row.family in methods.ONE_OF_EACH)
]
every_row_and_method = pytest.mark.parametrize("row, method", ROWS_AND_METHODS)
# In training, and what learns in `.eval()` as well: the other methods merge alike in both.
LEARNED = [name for name, config in METHODS.items() if config.learns]
IN_BOTH_MODES = [
    pytest.param(*each.values, training, id=f"{each.id}-{'train' if training else 'eval'}")
    for each in ROWS_AND_METHODS
    for training in (False, True)
    if training or each.values[1] in LEARNED
]


def snapshot(model: nn.Module) -> dict[str, tuple[type, set[str]]]:
    return {name: (type(module), set(vars(module))) for name, module in model.named_modules()}


@pytest.mark.parametrize("row, method, training", IN_BOTH_MODES)
def test_where_nothing_is_reduced_all_is_the_plain_model_bit_for_bit(row: Row, method: str, training: bool) -> None:
    """Outputs and gradients, with every kind of dropout."""
    names = "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate"
    dropout = dict.fromkeys(names, 0.3)
    plain = row.make(**dropout).train(training)
    model = attach(row.make(**dropout), methods.METHODS[method].nothing).train(training)
    with torch.no_grad():
        assert same_bits(run(row, model), run(row, plain))
    found = gradients(row, model)
    learned = [found.pop(name) for name in list(found) if "merge_embedding" in name]
    assert same_bits(found, gradients(row, plain))
    assert not any(gradient.any() for gradient in learned)


@torch.no_grad()
@every_row_and_method
def test_unmerged_and_detached_it_is_the_plain_model_bit_for_bit(row: Row, method: str) -> None:
    """Outputs; and of what is detached, classes, attributes, state and config."""
    model = row.make()
    before, modules, state, config = run(row, model), snapshot(model), model.state_dict(), model.config.to_dict()
    assert attach(model, METHODS[method]) is model
    assert not same_bits(run(row, model), before)
    with model.unmerged():
        assert same_bits(run(row, model), before)
    with torch.enable_grad():
        gradients(row, model.train())
    assert detach(model.eval()) is model
    assert snapshot(model) == modules
    assert same_bits(model.state_dict(), state)
    assert model.config.to_dict() == config
    assert same_bits(run(row, model), before)


@every_row
def test_a_merged_model_is_one_of_its_own_class(row: Row) -> None:
    """isinstance, names, signature and the plain model's parameters stay; what is learned comes in one container."""
    plain, model = row.make(), attach(row.make(), METHODS["dtem"])
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    ours = [(name, module) for name, module in model.named_modules() if "merge_embedding" not in name]
    for (name, module), (_, stock) in zip(ours, plain.named_modules(), strict=True):
        assert isinstance(module, type(stock)), name
        assert (type(module).__name__, type(module).__module__) == (type(stock).__name__, type(stock).__module__)
    keys, learned = list(plain.state_dict()), {f"layers.{i}.{part}" for i in range(4) for part in ("weight", "bias")}
    assert [key for key in model.state_dict() if "merge_embedding" not in key] == keys
    assert set(model.to_merge_adapter().tensors) == learned
    assert len(model.state_dict()) - len(keys) == len(list(model.merge_parameters())) == len(learned)
    assert list(attach(model, METHODS["tome"]).state_dict()) == keys
    assert list(model.merge_parameters()) == []


@torch.no_grad()
@every_row
def test_untrained_dtem_from_keys_is_tome(row: Row) -> None:
    ours, theirs = (run(row, attach(row.make(), config(r=UNEVEN))) for config in (DTEMConfig, ToMeConfig))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", [row for row in ROWS if "sdpa" in row.case.attentions], ids=str)
def test_eager_attention_trains_as_sdpa_does(row: Row) -> None:
    """In `.eval()`, both are held against the slow reference."""
    models = [merged(row, DTEMConfig(r=9, **MILD), attention).train() for attention in ("eager", "sdpa")]
    ours, theirs = (gradients(row, model) for model in models)
    assert ours.keys() == theirs.keys()
    largest = max(float(value.norm()) for value in theirs.values())
    for name in ours:
        assert (ours[name] - theirs[name]).norm() < 1e-3 * theirs[name].norm() + 1e-6 * largest, name


@torch.no_grad()
@every_row
def test_recorded_states_have_the_plans_lengths(row: Row) -> None:
    model = merged(row, DTEMConfig(r=UNEVEN), "eager")
    plan = model.merge_plan()
    output = model(**row.inputs(2), output_hidden_states=True, output_attentions=True)
    if "grid_thw" in row.inputs(1):  # every layer takes and returns all rows
        assert [len(state) for state in output.hidden_states] == [2 * plan.output_tokens] * 5
        return
    if "spatial_shapes" in row.inputs(1) and row.output == "logits":  # a mean over a mask reads all tokens in place
        assert [state.shape[1] for state in output.hidden_states] == [plan.num_tokens] * 5
    else:
        assert [state.shape[1] for state in output.hidden_states] == [plan.num_tokens, *plan.tokens]
    entering = [plan.num_tokens, *plan.tokens[:-1]]
    assert [weights.shape[-2:] for weights in output.attentions] == [(n, n) for n in entering]
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), atol=1e-5, rtol=0)


@torch.no_grad()
@every_row_and_method
def test_a_trace_says_which_token_every_patch_ended_in(row: Row, method: str) -> None:
    """As many point at a token as it stands for, prefix tokens stand for themselves; only the last pass stays."""
    model = merged(row, METHODS[method])
    plan, prefix = model.merge_plan(), row.anatomy.prefix
    with model.trace_merging() as trace:
        run(row, model, row.inputs(5))
        outputs = run(row, model)
    # A trace sees all rows of the last layer, of which a classifier else leaves some out: the same up to rounding.
    torch.testing.assert_close(outputs, run(row, model), atol=1e-5, rtol=1e-5)
    assert len(trace.source_maps) == len(trace.sizes) == 4
    for source, sizes, count in zip(trace.source_maps, trace.sizes, plan.tokens, strict=True):
        assert source.dtype == torch.int64 and source.shape == (2, plan.num_tokens)
        assert sizes.dtype == torch.float32 and sizes.shape == (2, count)
        for image in range(2):
            assert source[image].bincount(minlength=count).tolist() == sizes[image].tolist()
        assert source[:, :prefix].tolist() == [list(range(prefix))] * 2
        assert (sizes[:, :prefix] == 1).all()


@torch.no_grad()
@every_row
def test_a_soft_trace_follows_every_token_to_its_place(row: Row) -> None:
    model = merged(row, METHODS["dtem"]).train()
    with model.trace_merging() as trace:
        run(row, model)
    for source, sizes in zip(trace.source_maps, trace.sizes, strict=True):
        assert source.sort(dim=1).values.tolist() == [list(range(source.shape[1]))] * 2
        torch.testing.assert_close(sizes.sum(1), torch.full((2,), float(source.shape[1])), atol=1e-3, rtol=0)


class Choice(nn.Module):
    """A predictor that is certain: of all patches, or of those that an earlier stage has kept, to keep the chosen."""

    def __init__(self, chosen: list[int], earlier: list[int]) -> None:
        super().__init__()
        self.chosen, self.earlier = chosen, earlier

    def forward(self, x: Tensor, counted: Tensor) -> Tensor:
        patches = range(x.shape[1]) if x.shape[1] > len(self.earlier) else self.earlier
        sure = torch.tensor([[0.0, -1e4] if i in self.chosen else [-1e4, 0.0] for i in patches])
        return sure.expand(x.shape[0], -1, -1)


@torch.no_grad()
@every_row
def test_dtps_that_draws_what_it_keeps_in_use_gives_the_same_in_training(row: Row) -> None:
    """Pruned tokens stay in training, and nothing that a model gives depends on them."""
    model = attach(row.make(), DTPSConfig(0.5, [1, 3]))
    encoder = find_encoder(model)[1]
    patches = model.merge_plan().num_tokens - encoder.merging.method.geometry.num_prefix_tokens
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(3)).tolist()
    first, second = sorted(order[: patches // 2]), sorted(order[: patches // 4])
    encoder.merge_embedding.predictors = nn.ModuleList([Choice(first, []), Choice(second, first)])
    hard = run(row, model)[row.output]
    relax(model, True)
    if "grid_thw" in row.inputs(1):
        with pytest.raises(UnsupportedModelError, match="rows cannot hold pruned tokens"):
            run(row, model)
        return
    with model.trace_merging() as trace:
        drawn = run(row, model)[row.output]
    kept = trace.sizes[-1] > 0.5
    assert kept.sum(dim=1).eq(len(second) + model.merge_plan().num_tokens - patches).all()
    if drawn.shape != hard.shape:  # all tokens in place, of which an encoder in use returns those that are left
        drawn = drawn[kept].view_as(hard)
    torch.testing.assert_close(drawn, hard, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("asked", [False, True], ids=["as-is", "interpolated"])
@pytest.mark.parametrize("row", [row for row in ROWS if "spatial_shapes" not in row.inputs(1)], ids=str)
def test_other_image_sizes_follow_their_own_plan_or_are_refused_as_ever(row: Row, asked: bool) -> None:
    plain, inputs = row.make(), row.inputs(2, 48, 24)
    knows = "interpolate_pos_encoding" in inspect.signature(plain.forward).parameters
    options = {"interpolate_pos_encoding": True} if asked and knows else {}
    try:
        expected = run(row, plain, inputs, **options)
    except (ValueError, RuntimeError) as refused:
        with pytest.raises(type(refused), match=re.escape(str(refused))):
            run(row, merged(row, METHODS["tome"]), inputs, **options)
        return
    model = merged(row, METHODS["tome"])
    plan = model.merge_plan(image_size=(48, 24))
    with model.trace_merging() as trace:
        ours = run(row, model, inputs, **options)
    assert [sizes.shape[1] for sizes in trace.sizes] == plan.tokens
    listed = run(row, merged(row, ToMeConfig(r=plan.reductions)), inputs, **options)
    torch.testing.assert_close(ours, listed, atol=1e-5, rtol=1e-5)
    model.set_reduction(0)
    assert same_bits(run(row, model, inputs, **options), expected)


@pytest.mark.parametrize("row, method, training", IN_BOTH_MODES)
def test_float16_stays_finite(row: Row, method: str, training: bool) -> None:
    """Outputs and all gradients; sizes stay float32 and add up."""
    assert_finite(row, method, torch.float16, training)


@every_row
def test_bfloat16_stays_finite(row: Row) -> None:
    """Its range is float32's: what is finite in float16 is so here, where every operator takes this type, too."""
    for method in METHODS if row.family == "vit" else ["dtem"]:
        assert_finite(row, method, torch.bfloat16, training=True)


def assert_finite(row: Row, method: str, dtype: torch.dtype, training: bool) -> None:
    model = attach(row.make().to(dtype), METHODS[method]).train(training)
    with model.trace_merging() as trace:
        output = run(row, model)[row.output]
    assert output.dtype == dtype and output.isfinite().all()
    for sizes in trace.sizes:
        assert sizes.dtype == torch.float32 and not sizes.requires_grad
        whole = torch.full((2,), float(model.merge_plan().num_tokens))
        torch.testing.assert_close(sizes.sum(1), whole, atol=1e-3, rtol=0)
    if training:
        output.float().square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in found.values())
        learned = [gradient for name, gradient in found.items() if "merge_embedding" in name]
        assert any(gradient.any() for gradient in learned) == (method in LEARNED)


@every_row
def test_gradient_checkpointing_changes_no_gradient(row: Row) -> None:
    found = []
    for checkpointing in (False, True):
        model = attach(row.make(), DTEMConfig(r=9, **MILD)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(row, model))
    assert found[0].keys() == found[1].keys()
    assert any("merge_embedding" in name for name in found[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("row", [row for row in ROWS if autos_of(row.model)], ids=str)
def test_saved_and_loaded_it_is_the_same_bit_for_bit(row: Row, tmp_path: Path) -> None:
    """The whole model, plain again on demand, and the adapter alone."""
    auto = getattr(dtem_hf, autos_of(row.model)[0])
    model = merged(row, DTEMConfig(r=UNEVEN))
    expected = run(row, model)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.merge_config == model.merge_config
    assert same_bits(loaded.state_dict(), model.state_dict())
    assert same_bits(run(row, loaded), expected)
    plain = auto.from_pretrained(tmp_path, merge=None)
    assert type(plain) is row.model
    assert same_bits(run(row, plain), run(row, row.make()))
    model.save_merge_adapter(tmp_path / "adapter")
    assert same_bits(run(row, attach(row.make(), tmp_path / "adapter")), expected)
    assert same_bits(run(row, auto.from_pretrained(tmp_path, merge=tmp_path / "adapter")), expected)


@torch.no_grad()
@every_row_and_method
def test_the_plan_is_what_torch_counts(row: Row, method: str) -> None:
    """Also where a pass is recorded or merges nothing, which is the same pass with every method."""
    model = attach(row.make("eager"), METHODS[method])
    plan, (family, encoder) = model.merge_plan(), find_encoder(model)
    counted = encoder if isinstance(model, family.composites) else model
    passes = [(plan.multiply_adds, nullcontext)]
    if method == "tome":
        passes += [(plan.multiply_adds, model.trace_merging), (plan.unmerged_multiply_adds, model.unmerged)]
    for expected, context in passes:
        with context(), FlopCounterMode(display=False) as counter:
            run(row, counted, row.inputs(1))
        assert expected == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@torch.no_grad()
@every_row
def test_batches_and_threads_change_no_prediction(row: Row) -> None:
    """Batches of 1 and of 24 (every sixth image), one and two threads: torch shares out this many tokens."""
    model, inputs = merged(row, METHODS["dtem"]), row.inputs(24)
    together = run(row, model, inputs)[row.output]
    chosen = range(0, 24, 6)
    alone = [run(row, model, {name: value.chunk(24)[i] for name, value in inputs.items()}) for i in chosen]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threaded = run(row, model, inputs)[row.output]
    finally:
        torch.set_num_threads(before)
    pairs = [
        (torch.cat([output[row.output] for output in alone]), torch.cat([together.chunk(24)[i] for i in chosen])),
        (threaded, together),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert ours.flatten(1).argmax(-1).tolist() == theirs.flatten(1).argmax(-1).tolist()


@pytest.mark.parametrize("method", [name for name, case in methods.METHODS.items() if case.needs_cls])
@pytest.mark.parametrize("row", [row for row in ROWS if not row.has_cls], ids=str)
def test_what_needs_a_cls_token_is_refused_without_one(row: Row, method: str) -> None:
    model = row.make()
    modules = snapshot(model)
    with pytest.raises(
        UnsupportedModelError, match=rf"method='{method}'.*(Model|Transformer|Encoder) has none; use 'tome'"
    ):
        attach(model, METHODS[method])
    assert snapshot(model) == modules
    assert not hasattr(model.config, "merge")
