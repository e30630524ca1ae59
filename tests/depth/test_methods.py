"""Which layers go: each measure against plain forwards of transformers, and what follows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from liar_depth import MODELS, build

from liar_ext import InputError, Recipe
from liar_ext.calibration.batch import Batch
from liar_ext.depth import surgery
from liar_ext.depth.choice import LayerChoice, choice_states, choose, measure
from liar_ext.depth.losses import losses_without
from liar_ext.depth.methods import METHODS, pick
from liar_ext.depth.states import turns
from liar_ext.depth.surgery import layer_list
from liar_ext.engine.clock import Clock
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import DeviceShelf
from liar_ext.engine.store import InMemory
from liar_ext.evaluation.mode import inference

LAYERS = 6
CPU = torch.device("cpu")
# with an adapter of their own
KNOWN = [name for name in MODELS if name != "gptj"]
# float32 forwards whose batches differ; sums are float64
SAME = 1e-5


def batches(count=3, size=4, length=20, padded=False):
    generator = torch.Generator().manual_seed(5)
    found = []
    for at in range(count):
        ids = torch.randint(3, 96, (size, length), generator=generator)
        mask = torch.ones(ids.shape, dtype=torch.bool)
        if padded:
            mask[at % size, length - 3 - at :] = False
        found.append(Batch(ids, mask))
    return tuple(found)


def runtime_of(model):
    return Runtime(InMemory(model), CPU, Clock(CPU))


@torch.no_grad()
def states_of(model, tokens):
    """What enters each layer, and what leaves the last in front of any norm, valid tokens."""
    layers, seen = layer_list(model)[1], []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    handles.append(
        layers[-1].register_forward_hook(
            lambda _, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    rows = [[] for _ in range(LAYERS + 1)]
    for batch in tokens:
        seen.clear()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long())
        for own, states in zip(rows, seen, strict=True):
            own.append(states[batch.attention_mask].double())
    for handle in handles:
        handle.remove()
    return [torch.cat(own) for own in rows]


@torch.no_grad()
def loss_of(model, tokens):
    total = count = 0.0
    for batch in tokens:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        wanted = batch.input_ids[:, 1:].masked_fill(~batch.attention_mask[:, 1:], -100)
        own = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).double(), wanted.flatten(), reduction="sum"
        )
        total, count = total + float(own), count + int((wanted != -100).sum())
    return total / count


@pytest.mark.parametrize("name", KNOWN)
def test_turns_are_those_of_plain_hidden_states(name):
    """Padding is left out, and the last span ends in front of the final norm."""
    model, tokens = build(name), batches(padded=True)
    states = states_of(model, tokens)
    with inference(model):
        found = turns(runtime_of(model), tokens, [1, 2, LAYERS])
    for span, own in found.items():
        assert len(own) == LAYERS - span + 1
        for first, turn in enumerate(own):
            cosines = F.cosine_similarity(states[first], states[first + span], dim=-1)
            assert turn.influence == pytest.approx(1 - float(cosines.mean()), abs=SAME)
            angle = float((cosines.acos() / math.pi).mean())
            assert turn.angle == pytest.approx(angle, abs=1e-4)


def test_the_final_norm_is_not_part_of_the_last_layer():
    """`hidden_states[-1]` of transformers is behind it: the published code compares with that."""
    model, tokens = build("llama"), batches()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-3, 3, 32))
    with inference(model):
        found = turns(runtime_of(model), tokens, [1])[1][-1].influence
        stock = [
            F.cosine_similarity(
                *model(b.input_ids, output_hidden_states=True).hidden_states[-2:], -1
            )
            for b in tokens
        ]
    states = states_of(model, tokens)
    own = 1 - float(F.cosine_similarity(states[-2], states[-1], dim=-1).mean())
    assert found == pytest.approx(own, abs=SAME)
    assert abs(found - (1 - float(torch.stack(stock).mean()))) > 0.05


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "bert"])
def test_losses_are_those_of_models_without_the_layers(name):
    model, tokens = build(name), batches(padded=True)
    choices = [(), (0,), (5,), (2, 3), (1, 2, 4), (3,)]
    with inference(model):
        found = losses_without(runtime_of(model), tokens, choices)
    for choice, loss in zip(choices, found, strict=True):
        kept = [layer for layer in range(LAYERS) if layer not in choice]
        assert loss == pytest.approx(loss_of(surgery(model, kept), tokens), rel=SAME)


def test_choices_share_what_they_have_in_common():
    """Not the L (L − 1) forwards of a layer of as many models."""
    model, tokens = build("llama"), batches()
    runtime, calls = runtime_of(model), []
    for layer in runtime.layers:
        layer.mlp.register_forward_hook(lambda *_: calls.append(1))
    with inference(model):
        losses_without(runtime, tokens, [(layer,) for layer in range(LAYERS)])
    assert len(calls) == len(tokens) * (LAYERS * (LAYERS + 1) // 2 - 1)


@pytest.mark.parametrize("power", [1, 2])
def test_magnitudes_are_sums_over_parameters(power):
    model = build("llama")
    found = measure(f"magnitude-l{power}", runtime_of(model), Recipe(), ())
    for value, layer in zip(found, model.model.layers, strict=True):
        own = sum(float(p.detach().double().abs().pow(power).sum()) for p in layer.parameters())
        assert value == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt"])
def test_taylor_is_that_of_one_backward_through_the_whole_model(name):
    model, tokens = build(name), batches(padded=True)
    recipe = Recipe(depth="taylor", drop=1, gradient_samples=100)
    with inference(model):
        found = measure("taylor", runtime_of(model), recipe, tokens)
    loss = count = 0.0
    for batch in tokens:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        wanted = batch.input_ids[:, 1:].masked_fill(~batch.attention_mask[:, 1:], -100)
        loss = loss + F.cross_entropy(
            logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="sum"
        )
        count += int((wanted != -100).sum())
    (loss / count).backward()
    for value, layer in zip(found, layer_list(model)[1], strict=True):
        own = sum(
            float((p.detach().double() * p.grad.double()).abs().sum())
            for p in layer.parameters()
            if p.grad is not None
        )
        assert value == pytest.approx(own, rel=1e-4)


def idle(model, layer):
    """Make a layer pass on what enters it."""
    with torch.no_grad():
        own = model.model.layers[layer]
        own.self_attn.o_proj.weight.zero_()
        own.mlp.down_proj.weight.zero_()


# to a random model's loss of random tokens, layers that do something may be no loss
@pytest.mark.parametrize(
    "method", [n for n, m in METHODS.items() if m.measure not in (None, "loss")]
)
@pytest.mark.parametrize("repair", ["none", "liar"])
def test_a_method_drops_layers_that_do_nothing(method, repair):
    """Two in a row, so that a window has them as well."""
    model, tokens = build("llama"), batches()
    idle(model, 3)
    idle(model, 4)
    recipe = Recipe(depth=method, drop=2, span_repair=repair, search_samples=100)
    with inference(model):
        found = choose(recipe, runtime_of(model), tokens)
    assert found.dropped == (3, 4)
    assert found.kept == (0, 1, 2, 5)
    assert found.gaps == {2: range(3, 5)}
    assert LayerChoice.from_json(found.to_json()) == found


@pytest.mark.parametrize("repair", ["none", "liar"])
def test_those_whose_absence_costs_least_go(repair):
    model, tokens = build("llama"), batches()
    fields = {"drop": 3, "span_repair": repair, "search_samples": 100}
    left = list(range(0 if repair == "none" else 1, LAYERS))
    with inference(model):
        runtime = runtime_of(model)
        together = choose(Recipe(depth="perplexity", **fields), runtime, tokens)
        one_by_one = choose(Recipe(depth="perplexity-greedy", **fields), runtime, tokens)
    without = {
        c: loss_of(surgery(model, [i for i in range(LAYERS) if i != c]), tokens) for c in left
    }
    assert together.dropped == tuple(sorted(sorted(left, key=without.__getitem__)[:3]))
    gone = []
    for step in one_by_one.steps:
        # measured again without those that are gone
        options = {
            c: loss_of(surgery(model, [i for i in range(LAYERS) if i not in (*gone, c)]), tokens)
            for c in left
            if c not in gone
        }
        gone.append(min(options, key=options.__getitem__))
        assert step["loss"] == pytest.approx(options[gone[-1]], rel=SAME)
    assert [step["layer"] for step in one_by_one.steps] == gone
    # these are no measures of the layers in their order
    assert one_by_one.measured == {}
    assert LayerChoice.from_json(one_by_one.to_json()) == one_by_one
    assert one_by_one.dropped == tuple(sorted(gone))


def test_places():
    runtime = runtime_of(build("llama"))
    last = choose(Recipe(depth="reverse", drop=2, span_repair="none"), runtime, ())
    assert last.dropped == (4, 5)
    assert last.gaps == {3: range(4, 6)}
    drawn = {
        choose(Recipe(depth="random", drop=2, seed=seed), runtime, ()).dropped for seed in range(20)
    }
    assert len(drawn) > 3
    assert all(0 not in dropped for dropped in drawn), "nothing could stand in for the first layer"
    again = Recipe(depth="random", drop=2, seed=3)
    assert choose(again, runtime, ()) == choose(again, runtime, ())


def test_the_least_goes_and_of_equal_ones_the_later():
    assert pick([3.0, 1.0, 2.0, 1.0], 1, window=False) == (3,)
    assert pick([3.0, 1.0, 2.0, 1.0], 3, window=False) == (1, 2, 3)
    assert pick([0.5, 0.2, 0.4], 2, window=True) == (1, 2)


def test_nan_is_named_and_not_sorted():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    with inference(model), pytest.raises(InputError, match="layer 2: its influence is nan"):
        choose(Recipe(depth="shortgpt", drop=1), runtime_of(model), batches())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": "shortgpt"}, "--depth needs --drop N"),
        ({"drop": 2}, "--drop needs --depth METHOD"),
        ({"depth": "nonsense", "drop": 1}, "--depth nonsense: choose from reverse"),
        ({"depth": "reverse", "drop": 0}, "--drop 0: must be a whole number of at least 1"),
        ({"drop_layers": (1,), "depth": "reverse", "drop": 1}, "both say which layers go"),
        ({"drop_layers": ()}, r"--drop-layers \(empty\)"),
        ({"drop_layers": (1, 1)}, "--drop-layers 1,1: must be layers from 0, each once"),
        ({"drop_layers": (1,), "statistics": "oneshot"}, "oneshot with layers that are left out"),
        ({"drop_layers": (1,), "layers": (0, 2)}, "--layers 0:2 with layers that are left out"),
        ({"sparsity": 0}, "--sparsity 0: must be a number above 0"),
        ({"drop_layers": (1,), "sparsity": 1}, "or 0 to leave widths as they are"),
        ({"drop_layers": (1,), "span_repair": "x"}, "--span-repair x: choose from"),
    ],
)
def test_recipes_that_say_nothing_or_too_much(fields, message):
    with pytest.raises(InputError, match=message):
        Recipe(**fields)


def test_widths_stay_unless_they_are_asked_for():
    assert Recipe(drop_layers=(1,)).sparsity == 0
    assert not Recipe(drop_layers=(1,)).narrows
    assert Recipe(drop_layers=(1,), sparsity=0.5).narrows
    assert Recipe().sparsity == 0.3
    recipe = Recipe(depth="streamline", drop=2)
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": "reverse", "drop": 6}, "--drop 6: the model has 6 layers, of which 5 can go"),
        ({"drop_layers": (6,)}, "--drop-layers 6: the model has 6 layers, 0 to 5"),
        ({"drop_layers": tuple(range(6))}, "all 6 layers; keep at least one"),
        ({"drop_layers": (0, 3)}, "--drop-layers 0: nothing is in front of the first layer"),
    ],
)
def test_layers_that_are_not_there(fields, message):
    with pytest.raises(InputError, match=message):
        choose(Recipe(**fields), runtime_of(build("llama")), ())


def test_an_encoder_has_no_loss_to_go_by():
    model = build("bert")
    for method in ("perplexity", "taylor"):
        recipe = Recipe(depth=method, drop=1, span_repair="none")
        with inference(model), pytest.raises(InputError, match="shortgpt"):
            choose(recipe, runtime_of(model), batches())


class CountingShelf(DeviceShelf):
    """A shelf that knows how many hidden states wait on it at most."""

    def __init__(self):
        self.now = self.most = 0

    def put(self, tensor):
        item, rows = super().put(tensor), tensor.shape[:-1].numel()
        self.now += rows
        self.most = max(self.most, self.now)
        free = item.free

        def counted():
            self.now -= rows
            free()

        item.free = counted
        return item


@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.needs != "nothing"])
def test_no_more_waits_than_is_counted(method):
    model, tokens = build("llama"), batches()
    recipe = Recipe(depth=method, drop=2, gradient_samples=4, search_samples=8)
    runtime, shelf = runtime_of(model), CountingShelf()
    runtime.shelf = shelf
    with inference(model):
        choose(recipe, runtime, tokens)
    # windows of 20 tokens in 3 batches of 4, of which 1 and 2 are taken
    counted = choice_states(recipe, LAYERS, own=240, gradients=80, losses=160)
    assert shelf.most <= counted
    assert shelf.most > 0.5 * counted or counted == 0
    assert shelf.now == 0, "all is freed"
