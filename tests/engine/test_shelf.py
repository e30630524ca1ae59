"""Shelves: what waits there comes back with the same bits, and is out of memory meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from liar_families import FAMILIES, batches_of, probe_tokens, tree_hash, write_tokens
from torch.utils._python_dispatch import TorchDispatchMode

import liar_ext
from liar_ext import Execution, InputError, Recipe
from liar_ext.calibration.batch import Batch
from liar_ext.engine import capture
from liar_ext.engine.calls import LayerCall, record_calls, shared
from liar_ext.engine.capture import LayerRun, pausing
from liar_ext.engine.execution import choose_place, make_shelf
from liar_ext.engine.shelf import DeviceShelf, DiskShelf, HostShelf, restored
from liar_ext.models import adapter_for

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool)


@pytest.fixture(params=["device", "host", "disk"])
def shelf(request, tmp_path):
    """On a CPU `host` is memory that is not pinned."""
    if request.param == "host":
        return HostShelf(CPU)
    return make_shelf(request.param, tmp_path, CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (0, 4)], ids=str)
def test_what_was_put_comes_back(shelf, dtype, shape, tmp_path):
    tensor = torch.rand(shape).mul(3).to(dtype)
    expected = tensor.clone()
    item = shelf.put(tensor)
    if shelf.moves:
        tensor.fill_(1)
    assert torch.equal(item.fetch(), expected)
    target = torch.empty_like(expected)
    item.refill(target)
    assert torch.equal(target, expected)
    data = item.save(tmp_path / "saved")
    item.free()
    assert torch.equal(restored(tmp_path / "saved", data, CPU), expected)
    assert restored(tmp_path / "saved", data, CPU).dtype == dtype


def test_disk_items_leave_no_file_behind(tmp_path):
    shelf = DiskShelf(tmp_path, CPU)
    items = [shelf.put(torch.ones(5)) for _ in range(3)]
    assert len(list(tmp_path.iterdir())) == 3
    for item in items:
        item.free()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_cut_is_not_taken_for_a_tensor(tmp_path):
    data = DeviceShelf().put(torch.ones(9)).save(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    with pytest.raises(OSError, match="has 35 bytes, not 36"):
        restored(tmp_path / "x", data, CPU)


NAMES = ("llama-gqa-biases", "qwen3-mixed", "mistral-sliding", "opt-post-norm", "gpt2", "bert")


@pytest.mark.parametrize("statistics", ["sequential", "oneshot"])
@pytest.mark.parametrize("name", NAMES)
def test_the_place_of_hidden_states_does_not_show_in_the_result(
    name, statistics, tmp_path, monkeypatch
):
    monkeypatch.setattr(capture, "SHELVED_BYTES", 1)  # tiny models have only small tensors
    FAMILIES[name].build().save_pretrained(tmp_path / "dense")
    recipe = Recipe(
        calibration=str(write_tokens(tmp_path / "t.npy")),
        sparsity=0.5,
        target=("ffn", "heads"),
        samples=24,
        seq_len=24,
        batch_size=5,
        statistics=statistics,
    )
    trees = {}
    for place in ("device", "disk"):
        out = tmp_path / place
        report = liar_ext.compress(
            tmp_path / "dense", out, recipe, execution=Execution(hidden_states=place)
        )
        assert report.run["hidden_states"] == place
        trees[place] = {
            path: digest for path, digest in tree_hash(out).items() if "report" not in str(path)
        }
    assert trees["device"] == trees["disk"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "device", "disk", "t.npy"]


@torch.no_grad()
def test_a_shelved_run_holds_no_memory_of_its_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "SHELVED_BYTES", 1024)
    model = FAMILIES["llama-mha"].build()
    ids = probe_tokens(8, 24)
    adapter = adapter_for(model.config)
    layers = adapter.layer_list(model)[1]
    hidden, calls = record_calls(
        adapter.backbone(model)[1], layers, Batch(ids, ids >= 0), CPU, {"use_cache": False}
    )
    shelf = DiskShelf(tmp_path, CPU)
    run = LayerRun(layers[0], shelf.put(hidden), calls[0], shelf)
    made: list[torch.UntypedStorage] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                made.append(out.untyped_storage())
            return out

    with pausing(adapter.sites_of(model, 0, ("ffn",))), Watch():
        _, x = run.to_next()
        expected = x.clone()
        mine = x.untyped_storage()
        run.shelve()
        assert mine.nbytes() == 0, "the Site's input is still in memory"
        assert torch.equal(run.again(), expected)
        run.shelve()
        run.keep(None)
        _, output = run.to_next()
        run.close()
    # the same forward without any pause
    plain = LayerRun(layers[0], DeviceShelf().put(hidden), calls[0], DeviceShelf())
    assert torch.equal(output, plain.to_next()[1])
    assert len(list(tmp_path.iterdir())) == 1, "only the hidden states are still on the shelf"


def test_weights_and_shared_arguments_are_never_shelved(tmp_path, monkeypatch):
    """Emptying a weight or a mask that other batches use would be a wrong result or a crash."""
    monkeypatch.setattr(capture, "SHELVED_BYTES", 1)
    model = FAMILIES["mistral-sliding"].build()
    recipe = Recipe(
        calibration=str(write_tokens(tmp_path / "t.npy")), samples=24, seq_len=24, batch_size=8
    )
    batches = batches_of(recipe, decoder=True)
    adapter = adapter_for(model.config)
    layers = adapter.layer_list(model)[1]
    shelf = DiskShelf(tmp_path, CPU)
    runs = []
    known: dict = {}
    with torch.no_grad(), pausing(adapter.sites_of(model, 0, ("heads", "ffn"))):
        for batch in batches:
            hidden, calls = record_calls(
                adapter.backbone(model)[1], layers, batch, CPU, {"use_cache": False}
            )
            runs.append(LayerRun(layers[0], shelf.put(hidden), shared(calls, known)[0], shelf))
        for run in runs:
            run.to_next()
            run.shelve()
            assert all(p.untyped_storage().nbytes() for p in layers[0].parameters())
            assert all(t.untyped_storage().nbytes() for like in known.values() for t in like)
        for run in runs:
            run.close()


def test_equal_arguments_of_batches_are_held_once(tmp_path):
    model = FAMILIES["llama-mha"].build()
    adapter = adapter_for(model.config)
    layers = adapter.layer_list(model)[1]
    known: dict = {}
    kept = []
    for seed in range(4):
        ids = probe_tokens(8, 24).roll(seed, 0)
        _, calls = record_calls(
            adapter.backbone(model)[1], layers, Batch(ids, ids >= 0), CPU, {"use_cache": False}
        )
        kept.append(shared(calls, known))
    rotary = [call[0].kwargs["position_embeddings"][0] for call in kept]
    assert len({table.data_ptr() for table in rotary}) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden_states": "moon"}, "--hidden-states moon"),
        ({"journal_seconds": -1.0}, "--journal-seconds -1"),
        ({"journal_seconds": float("nan")}, "--journal-seconds nan"),
        ({"scratch": Path("/nowhere/at/all")}, "--scratch /nowhere/at/all"),
    ],
)
def test_bad_execution_options_are_named(options, says):
    with pytest.raises(InputError, match=says):
        Execution(**options)


def test_the_policy_takes_the_first_place_with_room():
    assert choose_place("auto", 1, CPU) == "device"
    assert choose_place("auto", 1 << 60, CPU) == "disk"
    assert choose_place("disk", 1, CPU) == "disk"
    with pytest.raises(InputError, match="--hidden-states host"):
        choose_place("host", 1, CPU)


@pytest.mark.parametrize("place", ["device", "disk"])
@torch.no_grad()
def test_a_layer_that_writes_to_its_input_gets_back_what_it_wrote(place, tmp_path, monkeypatch):
    monkeypatch.setattr(capture, "SHELVED_BYTES", 1)
    model = FAMILIES["llama-mha"].build()
    site = adapter_for(model.config).sites_of(model, 0, ("ffn",))[0]

    class Layer(torch.nn.Module):
        def forward(self, states):
            states.mul_(2)
            return site.consumer(torch.ones(4, site.columns)).sum() * 0 + states

    shelf = make_shelf(place, tmp_path, CPU)
    run = LayerRun(Layer(), shelf.put(torch.full((4, 8), 3.0)), LayerCall((), {}), shelf)
    with pausing([site]):
        run.to_next()
        run.shelve()
        run.keep(None)
        assert torch.equal(run.to_next()[1], torch.full((4, 8), 6.0))


def test_a_control_group_s_limit_counts(monkeypatch):
    from liar_ext.engine import execution

    monkeypatch.setattr(execution, "_left_in_groups", lambda: iter([1 << 60, 12345]))
    assert execution.free_bytes(CPU) == 12345
    monkeypatch.setattr(execution, "_left_in_groups", lambda: iter([-5]))
    assert execution.free_bytes(CPU) == 0
    assert choose_place("auto", 1, CPU) == "disk"
