"""`liar bench latency`: which part of which module is timed, and what the file says. No times."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from liar_families import FAMILIES, UNLISTED, without_adapters
from liar_latency import write_table
from transformers import DynamicCache

from liar_ext import InputError
from liar_ext.bench import latency as bench
from liar_ext.bench.stopwatch import Stopwatch
from liar_ext.bench.workload import cache_for, calls_of, materialise, unchanged, with_cache
from liar_ext.caches import cache_option
from liar_ext.calibration import Batch
from liar_ext.checkpoint.reader import read_json
from liar_ext.cli import main
from liar_ext.demo import MODEL
from liar_ext.engine.calls import layer_output, record_calls
from liar_ext.engine.source import with_trace
from liar_ext.latency import LatencyTable, Workload, disturbances
from liar_ext.models import adapter_for, layout, linear

CPU = torch.device("cpu")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "latency.py"
DECODERS = [name for name, family in FAMILIES.items() if family.decoder]


@pytest.fixture(autouse=True)
def cold(monkeypatch):
    """Nobody waits for a machine to become warm."""
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)


def empty(name: str):
    return layout.empty_model(FAMILIES[name].build().config)


def sites(model, kinds=("ffn", "heads")):
    return adapter_for(model.config).sites_of(model, 0, kinds)


# -- what is timed -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_site_lasts_from_its_first_producer_to_its_consumer(name):
    """With a clock that counts the linears that were called."""
    model = FAMILIES[name].build()
    watched = [site for layer in range(2) for site in _all_sites(model, layer)]
    calls: list[torch.nn.Module] = []
    for site in watched:
        producers = {p.path: site.module.get_submodule(p.path) for p in site.spec.producers}
        for module in (*producers.values(), site.consumer):
            module.register_forward_pre_hook(lambda module, args: calls.append(module))
    watch = Stopwatch(CPU)
    watch.now = lambda: len(calls)
    ids = torch.full((2, 7), 3)
    with watch.on(watched):
        for _ in range(2):
            adapter_for(model.config).backbone(model)[1](input_ids=ids)
    laps = watch.take()
    # the clock's hooks come after the counting ones: a Site's first producer is counted when it
    # begins, and the rest of its linears when it ends
    expected = {
        place: [float(len({p.path for p in site.spec.producers}))] * 2
        for place, site in enumerate(watched)
    }
    assert laps == expected
    assert watch.take() == {}
    # and the hooks are gone
    adapter_for(model.config).backbone(model)[1](input_ids=ids)
    assert watch.take() == {}


def _all_sites(model, layer):
    return adapter_for(model.config).sites_of(model, layer, ("ffn", "heads"))


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_measured_and_its_table_read(name, mode, tmp_path):
    if mode == "decode" and name not in DECODERS:
        with pytest.raises(InputError, match="--mode decode: a .* model generates no tokens"):
            bench.measure(empty(name), Workload(mode, 1, 8), CPU)
        return
    found = bench.measure(empty(name), Workload(mode, 2, 11), CPU, points=4, repeats=2)
    (tmp_path / "t.json").write_text(json.dumps(found))
    table = LatencyTable.read(tmp_path / "t.json")
    model = FAMILIES[name].build()
    for layer in range(2):
        for site in _all_sites(model, layer):
            budget = table.budget(site, model.config)
            assert 0 < budget.price(1) <= budget.price(site.units)
    kinds = [own["shape"]["kind"] for own in found["tables"]]
    # layers that attend differently have a table of heads each, and one of their FFN together
    different = 2 if name.endswith("-mixed") else 1
    heads = ["heads"] * different if "heads" in FAMILIES[name].kinds else []
    assert sorted(kinds) == ["ffn", *heads]
    assert len(found["dense_layers"]) == different
    assert found["workload"] == {"mode": mode, "batch": 2, "seq_len": 11}


# what T5's first layer hands on is of its weights, which are random in a bench
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "t5-encoder"])
def test_a_layer_is_called_as_its_model_calls_it(name):
    """The recorded call gives a real layer the output that the model's own call gives."""
    real = FAMILIES[name].build()
    adapter = adapter_for(real.config)
    path, layers = adapter.layer_list(real)
    assert path
    with torch.no_grad():
        hidden, calls = calls_of(empty(name), Workload("prefill", 2, 9), CPU, torch.float32)
        ids = torch.full((2, 9), 3)
        options = {"use_cache": False} if adapter.decoder else {}
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
        backbone = adapter.backbone(real)[1]
        states, own = record_calls(backbone, layers, batch, CPU, options)
        assert hidden.shape == states.shape
        for index, layer in enumerate(layers):
            expected = layer_output(layer, hidden, own[index])
            assert torch.equal(layer_output(layer, hidden, calls[index]), expected)


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_is_the_next_token_of_a_prefill(name):
    """With the keys and values of 10 tokens, the 11th comes out as in a prefill of 11."""
    real = FAMILIES[name].build()
    adapter, config = adapter_for(real.config), real.config.get_text_config()
    backbone, layers = adapter.backbone(real)[1], adapter.layer_list(real)[1]
    ids = torch.full((2, 10), 3)
    with torch.no_grad():
        hidden, calls = calls_of(empty(name), Workload("prefill", 2, 11), CPU, torch.float32)
        _, steps = calls_of(empty(name), Workload("decode", 2, 10), CPU, torch.float32)
        options = {"use_cache": True, cache_option(backbone): DynamicCache(config=config)}
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
        _, fills = record_calls(backbone, layers, batch, CPU, options)
        for index, layer in enumerate(layers):
            expected = layer_output(layer, hidden, calls[index])[:, -1:]
            cache = DynamicCache(config=config)
            layer_output(layer, hidden[:, :10], with_cache(fills[index], cache))
            for _ in range(2):
                call = with_cache(steps[index], unchanged(cache))
                found = layer_output(layer, hidden[:, 10:], call)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_a_cache_is_as_wide_as_what_a_model_keeps(name):
    real, model = FAMILIES[name].build(), empty(name)
    adapter, config = adapter_for(real.config), real.config.get_text_config()
    work = Workload("decode", 2, 5)
    kept = DynamicCache(config=config)
    with torch.no_grad():
        ids = torch.full((2, 5), 3)
        backbone = adapter.backbone(real)[1]
        backbone(input_ids=ids, use_cache=True, **{cache_option(backbone): kept})
        hidden, calls = calls_of(model, work, CPU, torch.float32)
        for index, layer in enumerate(adapter.layer_list(real)[1]):
            cache = cache_for(model, index, layer, hidden, calls[index], work)
            assert cache.layers[index].keys.shape == kept.layers[index].keys.shape
            assert cache.layers[index].values.shape == kept.layers[index].values.shape


def test_a_cache_has_the_heads_that_are_left_and_stays_as_it_is():
    real, model = FAMILIES["llama-gqa-biases"].build(), empty("llama-gqa-biases")
    heads = sites(real, ("heads",))[0]
    heads.shrink(torch.arange(3))
    work = Workload("decode", 2, 10)
    with torch.no_grad():
        hidden, calls = calls_of(model, work, CPU, torch.float32)
        cache = cache_for(model, 0, heads.module, hidden, calls[0], work)
    assert cache.layers[0].keys.shape == (2, 3, 10, heads.head_dim)
    twin = unchanged(cache)
    new = torch.zeros(2, 3, 1, heads.head_dim)
    assert twin.update(new, new, 0)[0].shape[2] == 11
    assert cache.layers[0].keys.shape[2] == cache.get_seq_length() == 10


def test_layers_that_keep_nothing_do_not_decode():
    work, model = Workload("decode", 1, 4), empty("llama-mha")
    with torch.no_grad():
        hidden, calls = calls_of(model, work, CPU, torch.float32)
        with pytest.raises(InputError, match="llama model keep no keys and values; use prefill"):
            cache_for(model, 0, ForgetfulLayer(), hidden, calls[0], work)


class ForgetfulLayer(torch.nn.Module):
    def forward(self, hidden, *args, **kwargs):
        return hidden


@pytest.mark.parametrize("name", ["llama-mha", "gpt2"])
def test_random_matrices_keep_the_variance_of_what_they_are_given(name):
    """Of GPT-2 as well, whose linears have their inputs first."""
    layer = adapter_for(empty(name).config).layer_list(empty(name))[1][0]
    torch.manual_seed(0)
    materialise(layer, CPU, torch.float32)
    for module in linear.linears(layer):
        weight = linear.weight(module)
        assert float(weight.std() * weight.shape[1] ** 0.5) == pytest.approx(1, abs=0.1)


def test_copies_share_no_weights(monkeypatch):
    seen = []
    real = bench._rounds

    def rounds(variants, *rest):
        seen.extend(variants)
        return real(variants, *rest)

    monkeypatch.setattr(bench, "_rounds", rounds)
    bench.measure(empty("llama-mha"), Workload("prefill", 1, 4), CPU, points=4, repeats=1)
    places = [site.weight().data_ptr() for _, sites in seen for site in sites]
    assert len(places) == len(set(places)) == 2 * len(seen)
    units = [{site.kind: site.units for site in own} for _, own in seen]
    assert units[0] == {"ffn": 48, "heads": 4}
    assert {own["heads"] for own in units} == {1, 2, 3, 4}
    assert {own["ffn"] for own in units} == {1, 16, 32, 48}


def test_only_the_kinds_that_are_asked_for_are_made_smaller():
    found = bench.measure(
        empty("llama-mha"), Workload("prefill", 1, 4), CPU, target=("ffn",), points=4, repeats=1
    )
    assert [own["shape"]["kind"] for own in found["tables"]] == ["ffn"]


@pytest.mark.parametrize("stated", ["outer", "nested"])
def test_the_dtype_of_a_nested_model_may_be_stated_outside(stated):
    data = FAMILIES["llava"].build().config.to_dict()
    places = {"outer": data, "nested": data["text_config"]}
    for place in places.values():
        place.pop("dtype", None)
    places[stated]["dtype"] = "bfloat16"
    model = layout.empty_model(layout.config_object(data))
    found = bench.measure(model, Workload("prefill", 1, 4), CPU, points=2, repeats=1)
    assert found["dtype"] == "bfloat16"


def test_without_a_target_it_is_every_kind_and_one_that_is_not_there_is_refused(monkeypatch):
    work, model = Workload("prefill", 1, 4), empty("llama-mha")
    found = bench.measure(model, work, CPU, points=2, repeats=1)
    assert sorted(own["shape"]["kind"] for own in found["tables"]) == ["ffn", "heads"]
    adapter = adapter_for(model.config)
    alone = replace(adapter, sites=tuple(spec for spec in adapter.sites if spec.kind == "ffn"))
    monkeypatch.setattr(bench, "adapter_for", lambda config: alone)
    found = bench.measure(empty("llama-mha"), work, CPU, points=2, repeats=1)
    assert [own["shape"]["kind"] for own in found["tables"]] == ["ffn"]
    for target in (("heads",), ("ffn", "heads")):
        with pytest.raises(InputError, match="--target heads: this model has none; it has ffn"):
            bench.measure(empty("llama-mha"), work, CPU, target=target, points=2, repeats=1)


# -- which widths ------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 2, 5, 48, 512, 1536, 11008, 14336])
@pytest.mark.parametrize("kind", ["ffn", "heads"])
def test_widths_rise_from_one_unit_to_all(kind, units):
    found = bench.grid(kind, units, 12)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (1, units)
    assert len(found) <= 12
    assert len(found) == 12 or units < 50
    if kind == "ffn" and units >= 1536:
        assert all(width % 64 == 0 for width in found[1:-1])


def test_few_groups_are_all_measured():
    assert bench.grid("heads", 8, 12) == list(range(1, 9))
    assert bench.grid("heads", 32, 12)[:3] == [1, 3, 6]


def test_every_width_of_each_kind_has_a_copy():
    shapes = {"ffn": {"units": 512}, "heads": {"units": 4}}
    found = bench.widths(shapes, 12)
    assert found[0] == {"ffn": 512, "heads": 4}
    assert [own["ffn"] for own in found] == bench.grid("ffn", 512, 12)[::-1]
    assert [own["heads"] for own in found] == [4, 3, 2, 1] * 3


def test_a_busy_machine_is_told():
    steady = {"p20": [1.0, 2.0], "p50": [1.1, 2.1], "p80": [1.2, 2.4]}
    busy = {"p20": [1.0, 2.0], "p50": [1.1, 2.1], "p80": [3.0, 2.4]}
    assert disturbances([{"seconds": steady}]) == []
    (text,) = disturbances([{"seconds": busy}])
    assert text.startswith("1 of 2 widths vary: p80 is up to 3.00 times p20")


# -- the command -------------------------------------------------------------------------------


def test_the_command_writes_a_table_that_pruning_takes(tmp_path, capsys):
    file = tmp_path / "latency.json"
    words = ["--points", "4", "--repeats", "2", "--seq-len", "16", "--device", "cpu"]
    assert main(["bench", "latency", str(MODEL), "--out", str(file), *words]) == 0
    out = capsys.readouterr().out
    assert "one sequence of 16 tokens, float32" in out
    assert "dense layer 0" in out
    found = json.loads(file.read_text())
    assert found["model_type"] == "llama"
    assert found["repeats"] == 2
    assert {"torch", "device", "threads"} <= set(found["environment"])
    for own in found["tables"]:
        for name in ("p20", "p50", "p80"):
            assert len(own["seconds"][name]) == len(own["units"])
    assert (
        main(
            [
                *("plan", str(MODEL), "--budget", "latency", "--latency", str(file)),
                *("--target", "ffn,heads", "--sparsity", "0.2"),
            ]
        )
        == 0
    )
    assert "latency: predicted for one sequence of 16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mode", "decode", "--seq-len", "256"], "--seq-len 256: the model takes 255 tokens"),
        (["--seq-len", "257"], "--seq-len 257: the model takes 256 tokens"),
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--points", "1"], "--points 1: must be at least 2"),
        (["--target", "mlp"], "--target mlp: choose from ffn, heads"),
        (["--dtype", "int8"], "--dtype int8: choose from"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, says, tmp_path, capsys):
    file = tmp_path / "t.json"
    assert main(["bench", "latency", str(MODEL), "--out", str(file), *words]) == 2
    assert says in capsys.readouterr().err
    assert not file.exists()


def test_the_file_has_to_be_named(capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "latency", str(MODEL)])
    assert "--out" in capsys.readouterr().err
    file = tmp_path / "no" / "t.json"
    assert main(["bench", "latency", str(MODEL), "--out", str(file)]) == 2
    assert f"--out {file}: " in capsys.readouterr().err


@pytest.fixture
def _without_olmo2():
    with without_adapters("olmo2"):
        yield


@pytest.mark.usefixtures("_without_olmo2")
def test_a_family_without_an_adapter_is_traced(tmp_path, capsys):
    """One whose heads cannot be pruned: a decoder all the same."""
    config, file = UNLISTED["olmo2"].build().config, tmp_path / "t.json"
    config.save_pretrained(tmp_path)
    words = ["--mode", "decode", "--points", "2", "--repeats", "1", "--seq-len", "8"]
    words = ["bench", "latency", str(tmp_path), "--out", str(file), *words, "--device", "cpu"]
    assert main(words) == 2
    assert "`liar trace`" in capsys.readouterr().err
    assert main([*words, "--trace"]) == 0
    model = layout.empty_model(
        layout.config_object(with_trace(read_json(tmp_path / "config.json"), ()))
    )
    (ffn,) = sites(model)
    assert LatencyTable.read(file).budget(ffn, model.config).units == 48
    file.unlink()
    assert main([*words, "--trace", "--target", "ffn,heads"]) == 2
    assert "--target heads: the trace of 'olmo2' found none" in capsys.readouterr().err
    assert not file.exists()


def test_the_table_names_the_folder_that_one_stands_in(tmp_path, monkeypatch):
    file = tmp_path / "t.json"
    monkeypatch.chdir(MODEL)
    words = ["--points", "2", "--repeats", "1", "--seq-len", "4", "--device", "cpu"]
    assert main(["bench", "latency", ".", "--out", str(file), *words]) == 0
    assert json.loads(file.read_text())["source"] == MODEL.name


def test_a_lack_of_memory_names_the_options_to_lower(monkeypatch, tmp_path, capsys):
    def fails(*words, **more):
        raise MemoryError

    monkeypatch.setattr(bench, "measure", fails)
    assert main(["bench", "latency", str(MODEL), "--out", str(tmp_path / "t.json")]) == 1
    assert "lower --batch, --seq-len or --points" in capsys.readouterr().err


# -- predicted and measured --------------------------------------------------------------------


def run_script(tmp_path, *words: str) -> list[dict]:
    """The rows of the result: dense first."""
    spec = importlib.util.spec_from_file_location("liar_latency_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main([*words, "--json", str(tmp_path / "result.json")])
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    for row in rows:
        assert 0 < row["measured_seconds"]["p20"] <= row["measured_seconds"]["p50"]
        assert row["measured_seconds"]["p50"] <= row["measured_seconds"]["p80"]
    return rows


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_pruned_model_is_timed_beside_what_a_table_predicts(mode, tmp_path, capsys):
    model = layout.empty_model(layout.config_object(read_json(MODEL / "config.json")))
    work = {"mode": mode, "batch": 2, "seq_len": 32}
    table = write_table(tmp_path / "t.json", model, dtype="float32", workload=work)
    words = ("--repeats", "3", "--sparsities", "0.25", "--allocations", "levels")
    dense, pruned = run_script(tmp_path, "--latency", table, *words, "--samples", "16")
    assert dense["units"] == {"ffn": [512] * 5, "heads": [4] * 5}
    prices = {
        kind: LatencyTable.read(table).budget(site, model.config).price
        for kind in ("ffn", "heads")
        for site in sites(model, (kind,))
    }
    for row in (dense, pruned):
        expected = sum(prices[kind](u) for kind, own in row["units"].items() for u in own)
        assert row["predicted_seconds"] == pytest.approx(expected)
    # a neuron is the smallest step
    assert pruned["predicted_seconds"] == pytest.approx(0.75 * dense["predicted_seconds"], rel=1e-3)
    out = capsys.readouterr().out
    assert "predicted" in out and "of dense" in out


def test_of_a_table_of_both_kinds_only_what_is_targeted_is_predicted(tmp_path):
    model = layout.empty_model(layout.config_object(read_json(MODEL / "config.json")))
    work = {"mode": "prefill", "batch": 1, "seq_len": 8}
    table = write_table(tmp_path / "t.json", model, dtype="float32", workload=work)
    words = ("--target", "heads", "--repeats", "1", "--sparsities", "0.2")
    calibration = ("--samples", "8", "--calibration-seq-len", "32", "--allocations", "uniform")
    dense, pruned = run_script(tmp_path, "--latency", table, *words, *calibration)
    assert dense["predicted_seconds"] == pytest.approx(5 * 170e-6)
    price = LatencyTable.read(table).budget(sites(model, ("heads",))[0], model.config).price
    assert pruned["predicted_seconds"] == pytest.approx(sum(map(price, pruned["units"]["heads"])))


@pytest.mark.slow
def test_the_demo_model_measured_and_pruned_with_every_allocation(tmp_path):
    rows = run_script(tmp_path, "--repeats", "20")
    assert [(row["allocation"], row["sparsity"]) for row in rows[1:]] == [
        (name, sparsity)
        for name in ("uniform", "global", "kwon", "levels")
        for sparsity in (0.3, 0.5)
    ]
    for less, more in zip(rows[1::2], rows[2::2], strict=True):
        assert rows[0]["predicted_seconds"] > less["predicted_seconds"] > more["predicted_seconds"]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_gpu_is_timed_by_events(mode):
    found = bench.measure(
        empty("llama-gqa-biases"), Workload(mode, 2, 16), torch.device("cuda"), points=4, repeats=3
    )
    assert found["device_type"] == "cuda"
    for own in found["tables"]:
        assert all(0 < seconds < 1 for seconds in own["seconds"]["p50"])
