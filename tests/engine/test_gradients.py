"""The gradient pass against autograd on the whole model, with explicit gates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from liar_families import FAMILIES, LENGTH, VOCABULARY, batches_of, tree_hash, write_tokens
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.calibration import Batch
from liar_ext.criteria import CRITERIA
from liar_ext.engine import keeper as keeper_module
from liar_ext.engine.clock import Clock
from liar_ext.engine.execution import Execution
from liar_ext.engine.gradients import GradientPass, SiteGradients
from liar_ext.engine.loss import loss_gradient, next_tokens
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import DeviceShelf, DiskShelf
from liar_ext.engine.store import InMemory
from liar_ext.models import adapter_for, linear
from liar_ext.ops import logits as logits_module
from liar_ext.ops.saliency import TAYLOR_FORMS

CPU = torch.device("cpu")
DECODERS = [name for name, family in FAMILIES.items() if family.decoder]
# in float64; transformers keeps RMSNorm and rotary tables in float32 even then
EXACT = 1e-6
# a float32 forward and backward through two layers with weights of 0.2
SINGLE = 2e-4


def windows(samples: int = 5, length: int = 11, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY - 1, (samples, length), generator=generator)


def in_batches(ids: Tensor, size: int = 2) -> list[Batch]:
    return [Batch(part, torch.ones_like(part, dtype=torch.bool)) for part in ids.split(size)]


def found_by_the_pass(
    model: Any, batches: list[Batch], shelf: Any = None, **changes: Any
) -> SiteGradients:
    values = {"criterion": "taylor-mixed", "target": ("ffn", "heads"), **changes}
    recipe = Recipe(**values)
    layers = len(adapter_for(model.config).layer_list(model)[1])
    return GradientPass(
        Runtime(InMemory(model), CPU, Clock(CPU), shelf=shelf or DeviceShelf()),
        batches,
        recipe,
        range(*(recipe.layers or (0, layers))),
    ).results(None)


def by_autograd(model: Any, ids: Tensor) -> tuple[dict[Any, Tensor], dict[str, list[Tensor]]]:
    """Gradients of each example's mean loss: of gates on the consumers' inputs, (examples, units)
    by (layer, kind), and of all parameters, by name."""
    model = copy.deepcopy(model).double()
    adapter = adapter_for(model.config)
    gates, handles = {}, []
    for layer in range(len(adapter.layer_list(model)[1])):
        for site in adapter.sites_of(model, layer, ("ffn", "heads")):
            gate = torch.ones(site.units, dtype=torch.float64, requires_grad=True)
            wide = gate.repeat_interleave(site.columns_per_unit)
            gates[layer, site.kind] = gate
            handles.append(
                site.consumer.register_forward_pre_hook(
                    lambda module, args, wide=wide: (args[0] * wide, *args[1:])
                )
            )
    parameters = dict(model.named_parameters())
    rows: dict[Any, list[Tensor]] = {key: [] for key in gates}
    weights: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for row in ids:
        for gate in gates.values():
            gate.grad = None
        model.zero_grad()
        logits = model(input_ids=row[None]).logits[0]
        F.cross_entropy(logits[:-1], row[1:]).backward(retain_graph=True)
        for key, gate in gates.items():
            rows[key].append(gate.grad.clone())
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                weights[name].append(parameter.grad.clone())
    for handle in handles:
        handle.remove()
    return {key: torch.stack(found) for key, found in rows.items()}, weights


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) <= bound


def taylor_by_hand(site: Any, weights: dict[str, list[Tensor]], layer: str) -> dict[str, Tensor]:
    """The four sums of each unit, from gradients of whole weights, unit by unit."""
    found = {form: torch.zeros(site.units, dtype=torch.float64) for form in TAYLOR_FORMS}

    def add(unit: int, path: str, rows: Any, columns: Any, over: int) -> None:
        """One member of a group: a run of rows, or of columns, summed over the other side."""
        module = site.module.get_submodule(path)
        single = [
            g.T if isinstance(module, Conv1D) else g for g in weights[f"{layer}.{path}.weight"]
        ]
        w = linear.weight(module).double()[rows, columns]
        g = torch.stack(single).mean(0)[rows, columns]
        f = torch.stack(single).square().mean(0)[rows, columns]
        found["vector"][unit] += (w * g).sum(over).abs().sum()
        found["first"][unit] += (w * g).abs().sum()
        found["second"][unit] += (w**2 * f).sum()
        found["mixed"][unit] += (w * g - w**2 * f / 2).abs().sum()

    for unit in range(site.units):
        width = site.columns_per_unit
        own = slice(unit * width, (unit + 1) * width)
        add(unit, site.spec.consumer, slice(None), own, 0)
        for producer in site.spec.producers:
            total = linear.weight(site.module.get_submodule(producer.path)).shape[0]
            part = total // producer.segments
            each = part * producer.length // site.units
            start = producer.segment * part + unit * each
            add(unit, producer.path, slice(start, start + each), slice(None), 1)
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_are_those_of_the_whole_model(name):
    model = FAMILIES[name].build()
    ids = windows()
    gates, weights = by_autograd(model, ids)
    adapter = adapter_for(model.config)
    path = adapter.layer_list(model)[0]
    exact = found_by_the_pass(copy.deepcopy(model).double(), in_batches(ids))
    single = found_by_the_pass(model, in_batches(ids))
    assert set(exact) == set(gates)
    for (layer, kind), expected in gates.items():
        site = adapter.sites_of(model, layer, (kind,))[0]
        sums = taylor_by_hand(site, weights, f"{path}.{layer}")
        for found, bound in ((exact[layer, kind], EXACT), (single[layer, kind], SINGLE)):
            assert_close(found.gates, expected, bound)
            for form in TAYLOR_FORMS:
                # summed in float32, as the windows are one segment
                assert_close(found.taylor[form], sums[form], bound)


def test_the_vector_form_of_a_consumers_column_is_the_gradient_of_its_gate():
    model = FAMILIES["opt"].build()
    ids = windows()
    gates, weights = by_autograd(model, ids)
    gradient = torch.stack(weights["model.decoder.layers.1.fc2.weight"]).mean(0)
    weight = model.model.decoder.layers[1].fc2.weight.detach().double()
    assert_close((weight * gradient).detach().sum(0), gates[1, "ffn"].mean(0), EXACT)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(side):
    model = FAMILIES["llama-gqa-biases"].build().double()
    ids = windows(3)
    lengths = (11, 7, 4)
    padded, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(11 - length, 11)
        padded[row, place], mask[row, place] = ids[row, :length], True
    found = found_by_the_pass(model, [Batch(padded, mask)])
    alone = [
        found_by_the_pass(model, in_batches(ids[row : row + 1, :length]))
        for row, length in enumerate(lengths)
    ]
    for key, gradients in found.items():
        for row in range(3):
            assert_close(gradients.gates[row], alone[row][key].gates[0], EXACT)
        second = torch.stack([one[key].taylor["second"] for one in alone]).mean(0)
        assert_close(gradients.taylor["second"], second, EXACT)


def test_the_shelf_and_the_size_of_batches_do_not_show(tmp_path):
    model = FAMILIES["llama-gqa-biases"].build()
    on_device = found_by_the_pass(model, in_batches(windows()))
    on_disk = found_by_the_pass(model, in_batches(windows()), DiskShelf(tmp_path, CPU))
    assert not list(tmp_path.iterdir())
    other = found_by_the_pass(model, in_batches(windows(), 5))
    for key, expected in on_device.items():
        assert torch.equal(on_disk[key].gates, expected.gates)
        assert_close(other[key].gates, expected.gates, SINGLE)
        for form in TAYLOR_FORMS:
            assert torch.equal(on_disk[key].taylor[form], expected.taylor[form])


def test_only_what_is_asked_for_is_computed():
    model = FAMILIES["gpt2"].build()
    whole = found_by_the_pass(model, in_batches(windows(9)), gradient_samples=5)
    part = found_by_the_pass(
        model,
        in_batches(windows(9)[:5]),
        criterion="snip",
        target=("heads",),
        layers=(1, 2),
    )
    assert set(part) == {(1, "heads")}
    assert not part[1, "heads"].taylor
    assert torch.equal(part[1, "heads"].gates, whole[1, "heads"].gates)
    assert len(whole[0, "ffn"].gates) == 5


def test_parameters_stay_as_they_are():
    model = FAMILIES["llama-tied"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.lm_head.weight.requires_grad_(False)
    found_by_the_pass(model, in_batches(windows()))
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == (name != "model.embed_tokens.weight")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_in_chunks_give_the_gradient_of_all(monkeypatch, dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 101, bias=False, dtype=dtype).requires_grad_(False)
    states, targets = torch.randn(2, 13, 16, dtype=dtype), torch.randint(0, 101, (2, 13))
    targets[:, -1], targets[1, :4] = -100, -100
    whole = loss_gradient(head, states, targets)
    monkeypatch.setattr(logits_module, "CHUNK_LOGITS", 5 * 101)
    chunks = loss_gradient(head, states, targets)
    assert float(whole[1]) == pytest.approx(float(chunks[1]), rel=1e-5)
    assert whole[0].dtype == dtype
    assert_close(chunks[0].double(), whole[0].double(), 1e-2 if dtype == torch.bfloat16 else 1e-6)
    exact = states.double().requires_grad_()
    logits = F.linear(exact, head.weight.double())
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    (expected,) = torch.autograd.grad(loss, exact)
    assert_close(whole[0].double(), expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_target_of_a_token_is_the_next_valid_one():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    found = next_tokens(Batch(ids, mask)).tolist()
    assert found == [[6, 7, -100, -100], [-100, 7, 8, -100]]


# compressions


def prepared(tmp_path: Path, family: str, **changes: Any) -> tuple[Path, Recipe]:
    FAMILIES[family].build().save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    values = {"criterion": "taylor-mixed", "target": ("ffn", "heads"), "sparsity": 0.5, **changes}
    tokens = str(write_tokens(tmp_path / "tokens.npy"))
    return tmp_path / "dense", Recipe(
        calibration=tokens, samples=24, seq_len=LENGTH, batch_size=5, **values
    )


@pytest.mark.parametrize("family", ["llama-gqa-biases", "llama-tied", "gpt2"])
@pytest.mark.parametrize("criterion", ["snip", "fisher-rearranged", "taylor-mixed"])
def test_from_disk_to_disk_is_what_happens_in_memory(tmp_path, family, criterion):
    source, recipe = prepared(tmp_path, family, criterion=criterion)
    before = tree_hash(source)
    execution = Execution(hidden_states="disk")
    report = liar_ext.compress(source, tmp_path / "out", recipe, execution=execution)
    assert tree_hash(source) == before
    model = FAMILIES[family].build()
    other = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
    stored = liar_ext.load(tmp_path / "out").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(stored[name], value), name
    found = report.run["gradients"]
    assert found == other.run["gradients"]
    assert (found["samples"], found["predicted_tokens"]) == (16, 16 * (LENGTH - 1))
    assert report.seconds["backward"] > 0


def test_global_allocation_ranks_units_of_all_layers(tmp_path):
    source, recipe = prepared(
        tmp_path, "llama-mha", criterion="fisher", allocation="global", layers=(1, 2)
    )
    report = liar_ext.compress(source, tmp_path / "out", recipe)
    assert {site.layer for site in report.sites} == {1}
    assert report.totals["sparsity"] == pytest.approx(0.5, abs=0.05)


def test_a_resumed_run_does_not_repeat_the_pass(tmp_path, monkeypatch):
    source, recipe = prepared(tmp_path, "llama-mha")
    liar_ext.compress(source, tmp_path / "whole", recipe)
    keep = keeper_module.Keeper.keep

    def killed(self, position, hidden):
        keep(self, position, hidden)
        raise KeyboardInterrupt

    every = Execution(journal_seconds=0)
    with monkeypatch.context() as patched:
        patched.setattr(keeper_module.Keeper, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            liar_ext.compress(source, tmp_path / "out", recipe, execution=every)

    def refuse(self):
        raise AssertionError("the pass was repeated")

    monkeypatch.setattr(GradientPass, "_run", refuse)
    resume = Execution(journal_seconds=0, resume=True)
    report = liar_ext.compress(source, tmp_path / "out", recipe, execution=resume)
    assert report.run["gradients"]["samples"] == 16
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert not list(tmp_path.glob(".*.job"))


# what cannot be


def test_an_encoder_is_refused_and_told_what_it_can_use(tmp_path):
    source, recipe = prepared(tmp_path, "bert", criterion="snip")
    with pytest.raises(InputError) as refused:
        liar_ext.compress(source, tmp_path / "out", recipe)
    text = str(refused.value)
    assert "--criterion snip: needs the loss of the next token, and BertModel is an encoder" in text
    for name, criterion in CRITERIA.items():
        assert (name in text.partition("these need no loss: ")[2].split(", ")) != (
            criterion.differentiates
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.job"))


def test_a_decoder_without_a_head_is_refused():
    model = FAMILIES["llama-mha"].build().model
    with pytest.raises(InputError, match="LlamaModel has no language-model head"):
        liar_ext.prune(model, [windows(24)], Recipe(criterion="michel"))


def test_windows_without_a_next_token_are_refused():
    model = FAMILIES["llama-mha"].build()
    with pytest.raises(InputError, match="no next token to predict"):
        liar_ext.prune(model, [windows(100, length=1)], Recipe(criterion="fisher"))


def test_a_loss_that_is_not_finite_is_refused():
    model = FAMILIES["llama-mha"].build()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(InputError, match="the loss on the calibration windows is"):
        liar_ext.prune(model, [windows(24)], Recipe(criterion="fisher"))


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_the_number_of_windows_is_checked(value):
    with pytest.raises(InputError, match="--gradient-samples"):
        Recipe(gradient_samples=value)
