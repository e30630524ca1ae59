"""`--budget latency`: the table is read, refused by name, met by the widths, and reported."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from liar_families import FAMILIES, batches_of, write_tokens
from liar_latency import FIXED, table_data, write_table
from rich.console import Console

import liar_ext
from liar_ext import InputError, Recipe, planning, planning_table
from liar_ext.allocation import ALLOCATIONS
from liar_ext.comparison.grid import make_grid
from liar_ext.engine.identity import identity_of
from liar_ext.engine.inputs import load_calibration
from liar_ext.engine.source import dense_checkpoint
from liar_ext.jobs import JobsError, read_jobs
from liar_ext.latency import LatencyTable, shape_of
from liar_ext.models import adapter_for
from liar_ext.report.card import model_card
from liar_ext.report.html import FILE, write

RATES = {"forward": 1e9, "gram": 1e9, "solve": 1e9, "residual": 1e9}


def sites(model, layer: int = 0):
    return adapter_for(model.config).sites_of(model, layer, ("ffn", "heads"))


def setting(tmp_path, model, **changes) -> Recipe:
    values = {
        "budget": "latency",
        "latency": write_table(tmp_path / "latency.json", model),
        "calibration": str(write_tokens(tmp_path / "t.npy")),
        "samples": 24,
        "seq_len": 24,
        "batch_size": 8,
        "sparsity": 0.3,
        "target": ("ffn", "heads"),
        "device": "cpu",
    }
    return Recipe(**{**values, **changes})


def seconds(table: LatencyTable, model, report) -> tuple[float, float]:
    """Of the targeted Sites of the dense model, and with the widths of the report."""
    before = after = 0.0
    for done in report.sites:
        site = next(s for s in sites(model, done.layer) if s.kind == done.kind)
        budget = table.budget(site, model.config)
        before += budget.price(done.units_before)
        after += budget.price(done.units_after)
    return before, after


# -- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_a_family_is_found_in_its_table(name, tmp_path):
    model = FAMILIES[name].build()
    table = LatencyTable.read(write_table(tmp_path / "t.json", model))
    for layer in range(2):
        for site in sites(model, layer):
            budget = table.budget(site, model.config)
            low, high = FIXED[site.kind]
            assert (budget.kind, budget.units) == (site.kind, site.units)
            assert budget.price(1) == pytest.approx(low * 1e-6)
            assert budget.price(site.units) == pytest.approx(high * 1e-6)
            assert budget.cost == pytest.approx((high - low) * 1e-6 / (site.units - 1))


def test_shapes_tell_grouped_queries_and_kinds_of_attention_apart():
    grouped, plain = FAMILIES["mistral-gqa"].build(), FAMILIES["llama-mha"].build()
    found = [shape_of(sites(model)[0], model.config) for model in (grouped, plain)]
    assert [shape["kind"] for shape in found] == ["heads", "heads"]
    # 8 queries in 4 groups, or 4 heads of twice the width: as wide, but other keys and values
    assert [shape["units"] for shape in found] == [4, 4]
    assert [shape["columns"] for shape in found] == [32, 32]
    assert [shape["rows"] for shape in found] == [32 + 2 * 16, 3 * 32]
    mixed = FAMILIES["qwen2-mixed"].build()
    kinds = [
        {s.kind: shape_of(s, mixed.config)["attention"] for s in sites(mixed, layer)}
        for layer in range(2)
    ]
    assert [own["heads"] for own in kinds] == ["full_attention", "sliding_attention"]
    assert [own["ffn"] for own in kinds] == [None, None]


def test_noise_is_smoothed_by_the_reader_and_stays_in_the_file(tmp_path):
    model = FAMILIES["llama-mha"].build()
    data = table_data(model)
    heads = next(t for t in data["tables"] if t["shape"]["kind"] == "heads")
    heads["seconds"]["p50"] = [1.0, 3.0, 2.0, 4.0]
    (tmp_path / "t.json").write_text(json.dumps(data))
    table = LatencyTable.read(tmp_path / "t.json")
    budget = table.budget(sites(model)[0], model.config)
    assert [budget.price(u) for u in (1, 2, 2.5, 3, 4)] == [1.0, 2.5, 2.5, 2.5, 4.0]


def damaged(change) -> str:
    data = table_data(FAMILIES["llama-mha"].build())
    change(data)
    return json.dumps(data)


def first(data):
    return data["tables"][0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("[1]", "is no table of latencies"),
        ('{"benchmark": "gram"}', "is no table of latencies"),
        (damaged(lambda d: d.update(version=2)), "version 2; this release reads 1"),
        (damaged(lambda d: d.pop("dtype")), "is damaged ('dtype' is missing)"),
        (damaged(lambda d: d.pop("tables")), "is damaged ('tables' is missing)"),
        (damaged(lambda d: first(d)["shape"].pop("rows")), "'rows' is missing"),
        (damaged(lambda d: first(d).update(units=[1, 3, 2, 4])), "do not rise from 1 to 4"),
        (damaged(lambda d: first(d).update(units=[2, 3, 4])), "do not rise from 1 to 4"),
        (damaged(lambda d: first(d).update(units=[1, 2, 3])), "do not rise from 1 to 4"),
        (damaged(lambda d: first(d).update(units=[1, 2.5, 4])), "are not whole numbers"),
        (damaged(lambda d: first(d)["seconds"].update(p50=[1.0])), "for each number of units"),
        (damaged(lambda d: first(d)["seconds"].update(p50=[0.0] * 4)), "a time above 0"),
        (damaged(lambda d: first(d)["seconds"].update(p50=["a"] * 4)), "is damaged (could not"),
        (damaged(lambda d: d.update(tables=3)), "is damaged"),
        (damaged(lambda d: d.update(tables=[])), "is damaged (it has no tables)"),
        (damaged(lambda d: d.update(tables={})), "is damaged (it has no tables)"),
        (damaged(lambda d: d["tables"].append(first(d))), "heads of 4 units (32 inputs, 32 co"),
        (damaged(lambda d: d.update(workload=5)), "is damaged ("),
        (damaged(lambda d: d.update(workload={"mode": "prefill", "batch": 1})), "'seq_len'"),
        (damaged(lambda d: d["workload"].update(mode="train")), "must be prefill or decode"),
        (damaged(lambda d: d["workload"].update(batch="4")), "batch '4': must be a whole number"),
    ],
    ids=lambda value: "" if value is None or value.startswith(("{", "[")) else value,
)
def test_a_file_that_is_no_table_is_refused_in_one_line(content, says, tmp_path):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        LatencyTable.read(path)
    assert str(caught.value).startswith(f"--latency {path}: ")
    assert says in str(caught.value)
    assert "liar bench latency SRC --out FILE" in str(caught.value)


def test_a_table_of_another_model_or_shape_is_refused(tmp_path):
    llama = FAMILIES["llama-mha"].build()
    table = LatencyTable.read(write_table(tmp_path / "t.json", llama))
    qwen = FAMILIES["qwen2"].build()
    with pytest.raises(InputError, match="measured for llama, and this is a qwen2 model"):
        table.budget(sites(qwen)[0], qwen.config)
    other = copy.deepcopy(llama)
    sites(other)[1].shrink(torch.arange(40))
    with pytest.raises(InputError) as caught:
        table.budget(sites(other)[1], other.config)
    assert "has no ffn of 40 units (32 inputs, 40 columns, 32 outputs)" in str(caught.value)
    assert "it has heads of 4 units" in str(caught.value)
    assert "liar bench latency SRC --out FILE" in str(caught.value)


# -- the recipe --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"budget": "latency"}, "--budget latency needs --latency FILE; make one with: liar bench"),
        ({"latency": "t.json"}, "--latency t.json: is for --budget latency only, and --budget is"),
        ({"budget": "latency", "latency": 3}, "--latency 3: must be a file"),
    ],
)
def test_the_file_and_the_budget_go_together(values, says):
    with pytest.raises(InputError, match=says):
        Recipe(**values)


def test_a_path_is_kept_as_text(tmp_path):
    recipe = Recipe(budget="latency", latency=tmp_path / "t.json")
    assert recipe.latency == str(tmp_path / "t.json")
    assert Recipe.from_json(recipe.to_json()) == recipe


# -- compressions ------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("name", ["llama-gqa-biases", "bert"])
def test_the_budget_is_met_and_reported(name, allocation, tmp_path):
    model = FAMILIES[name].build()
    recipe = setting(tmp_path, model, allocation=allocation, criterion="wanda")
    dense = copy.deepcopy(model)
    batches = batches_of(recipe, decoder=FAMILIES[name].decoder)
    report = liar_ext.prune(model, batches, recipe)
    table = LatencyTable.read(recipe.latency)
    before, after = seconds(table, dense, report)
    totals = report.totals
    assert totals["site_latency_before"] == pytest.approx(before)
    assert totals["site_latency_after"] == pytest.approx(after)
    assert totals["sparsity"] == pytest.approx(1 - after / before)
    # the widest step is one of four heads, in both layers with uniform
    tolerance = (2 if ALLOCATIONS[allocation].equal else 1) * 0.5 * 40e-6 / before
    assert totals["sparsity"] == pytest.approx(0.3, abs=tolerance)
    # the others are counted, too, and whole
    for counts in ("parameters", "flops"):
        for when in ("before", "after"):
            assert isinstance(totals[f"site_{counts}_{when}"], int)
    assert report.latency["device"] == "An Imagined Accelerator"
    assert report.latency["workload"] == {"mode": "prefill", "batch": 4, "seq_len": 2048}
    assert report.latency["sha256"] == hashlib.sha256(Path(recipe.latency).read_bytes()).hexdigest()


def test_what_the_table_does_not_allow_is_refused_before_anything_runs(tmp_path):
    model = FAMILIES["llama-mha"].build()
    recipe = setting(tmp_path, model, sparsity=0.9, allocation="kwon")
    with pytest.raises(InputError, match="at most 0.6829 of the measured time can be removed"):
        liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)


def test_widths_that_a_gpu_dislikes_are_a_warning(tmp_path):
    model = FAMILIES["llama-mha"].build()
    recipe = setting(tmp_path, model)
    table = LatencyTable.read(write_table(tmp_path / "gpu.json", model, device_type="cuda"))
    assert "give --round-to 8" in table.warnings(("ffn",), 4)[0]
    assert table.warnings(("ffn", "heads"), 16) == table.warnings(("heads",), 1) == []
    assert LatencyTable.read(recipe.latency).warnings(("ffn",), 1) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two layers with grouped queries."""
    path = tmp_path_factory.mktemp("dense") / "model"
    FAMILIES["mistral-gqa"].build().save_pretrained(path)
    return path


def test_plan_prune_and_the_pages_say_the_same(folder, tmp_path):
    recipe = setting(tmp_path, FAMILIES["mistral-gqa"].build())
    plan = planning.plan(folder, recipe, rates=RATES)
    report = liar_ext.compress(folder, tmp_path / "out", recipe)
    totals = report.totals
    assert plan["exact"]
    assert plan["latency"]["before"] == totals["site_latency_before"]
    assert plan["latency"]["after"] == totals["site_latency_after"]
    assert plan["sparsity"]["achieved"] == pytest.approx(totals["sparsity"])
    console = Console(file=io.StringIO(), width=200)
    console.print(planning_table.render(plan))
    card = model_card(report)
    write(tmp_path / "out")
    page = (tmp_path / "out" / FILE).read_text(encoding="utf-8")
    shown = f"{totals['site_latency_after'] * 1e3:.3g} ms"
    measured = "4 sequences of 2,048 tokens, bfloat16, An Imagined Accelerator"
    for text in (console.file.getvalue(), card, page):
        assert shown in text
        assert measured in text
        assert "measured time" in text
    assert planning.plan(folder, Recipe(), rates=RATES)["latency"] is None


def test_another_table_is_another_run(folder, tmp_path):
    """By its content: a resumed run, or `liar compare`, refuses another under the same name."""
    model = FAMILIES["mistral-gqa"].build()
    recipe = setting(tmp_path, model)
    reader, empty, _ = dense_checkpoint(folder)
    calibration = load_calibration(folder, empty, recipe)

    def identity():
        return identity_of(recipe, reader, calibration, torch.device("cpu"), torch.float32)

    before = identity()
    write_table(Path(recipe.latency), model, date="2026-02-01")
    after = identity()
    assert {name for name in after if after[name] != before[name]} == {"latency"}
    plain = Recipe(calibration=recipe.calibration)
    assert "latency" not in identity_of(
        plain, reader, calibration, torch.device("cpu"), torch.float32
    )


def test_compare_takes_it_as_one_of_the_options_that_all_cells_share(tmp_path):
    base = setting(tmp_path, FAMILIES["mistral-gqa"].build())
    grid = make_grid(base, {"sparsities": (0.1, 0.3), "allocations": ("uniform", "kwon")})
    assert len(grid.cells) == 4
    assert {cell.recipe.latency for cell in grid.cells} == {base.latency}
    assert grid.fixed()["budget"] == "latency"


def test_a_batch_with_a_bad_table_does_not_start(folder, tmp_path):
    recipe = setting(tmp_path, FAMILIES["mistral-gqa"].build())
    Path(recipe.latency).write_text("{}")
    line = {**recipe.to_json(), "source": str(folder), "out": str(tmp_path / "out")}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(JobsError, match="jobs.jsonl:1: --latency .* is no table of latencies"):
        read_jobs(tmp_path / "jobs.jsonl", {})


def test_a_job_of_another_table_is_not_finished(folder, tmp_path):
    model = FAMILIES["mistral-gqa"].build()
    recipe = setting(tmp_path, model)
    liar_ext.compress(folder, tmp_path / "out", recipe)
    line = {**recipe.to_json(), "source": str(folder), "out": str(tmp_path / "out")}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(line) + "\n")
    (job,) = read_jobs(tmp_path / "jobs.jsonl", {}, resume=True)
    assert job.finished
    write_table(Path(recipe.latency), model, date="2026-02-01")
    (job,) = read_jobs(tmp_path / "jobs.jsonl", {}, overwrite=True, resume=True)
    assert not job.finished


def test_a_table_of_a_machine_in_use_is_doubted(tmp_path):
    tables = table_data(FAMILIES["llama-mha"].build())["tables"]
    tables[0]["seconds"]["p80"] = [2 * value for value in tables[0]["seconds"]["p20"]]
    file = write_table(tmp_path / "loud.json", FAMILIES["llama-mha"].build(), tables=tables)
    (text,) = LatencyTable.read(file).warnings(("heads",), 1)
    assert text.startswith(f"--latency {file}: ")
    assert "p80 is up to 2.00 times p20; measure again" in text
