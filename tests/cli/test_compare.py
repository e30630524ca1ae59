"""`liar compare`: each cell is what `liar prune` and `liar eval` give, with fewer passes; what was
stopped ends as if it had not been."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
import pytest
import torch
from liar_families import outputs, tree_hash
from safetensors.torch import load_file, save_file

import liar_ext
from liar_ext import Recipe
from liar_ext.cli import main
from liar_ext.comparison.grid import make_grid
from liar_ext.comparison.subject import Subject
from liar_ext.criteria import CRITERIA
from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
from liar_ext.engine.driver import Driver
from liar_ext.engine.repair import Repairer
from liar_ext.models.twin import twin
from liar_ext.report.text import signed

FIXED = ["--samples", "24", "--seq-len", "32", "--batch-size", "4"]
# what differs between two runs of the same work
TRANSIENT = ("seconds", "relative_to_forward", "forward_seconds", "peak_host_bytes")


def _arguments(inputs, out: Path, *options: str, bert: bool = False) -> list[str]:
    source, text = (inputs.bert, inputs.stsb) if bert else (inputs.llama, inputs.text)
    measured = f"stsb={inputs.stsb}" if bert else f"text={inputs.other}"
    own = [] if "--eval" in options else ["--eval", measured, "--eval-seq-len", "32"]
    place = ["--out", str(out), "--calibration", str(text)]
    return ["compare", str(source), *place, *FIXED, *own, *options]


def _compare(inputs, out: Path, *options: str, bert: bool = False) -> int:
    return main(_arguments(inputs, out, *options, bert=bert))


def _result(out: Path) -> dict:
    return json.loads((out / "comparison.json").read_text())


def _lasting(value):
    """JSON data without what no two runs have in common."""
    if isinstance(value, dict):
        return {k: _lasting(v) for k, v in value.items() if k not in TRANSIENT}
    return [_lasting(v) for v in value] if isinstance(value, list) else value


def _error(capsys) -> str:
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.fixture
def bf16(inputs, tmp_path) -> Path:
    """The LLaMA in bfloat16: computed in float32 on a CPU, and rounded when it is written."""
    folder = tmp_path / "bf16"
    shutil.copytree(inputs.llama, folder)
    file = folder / "model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})
    return folder


GRIDS = {
    "sequential": ["--targets", "ffn,heads", "--allocations", "uniform,global"],
    "oneshot": ["--targets", "heads;ffn", "--allocations", "global", "--statistics", "oneshot"],
    "bf16": ["--criteria", "wanda", "--reconstructions", "liar", "--bias", "always"],
    "bert": ["--targets", "heads;ffn", "--criteria", "flap", "--reconstructions", "bias,liar"],
    "search": [
        *("--allocations", "spdy,evolution", "--criteria", "random", "--targets", "ffn,heads"),
        *("--search-samples", "6", "--search-evaluations", "8"),
    ],
}


@pytest.mark.parametrize("name", GRIDS)
def test_every_cell_equals_prune_and_eval_of_its_recipe(inputs, tmp_path, capsys, bf16, name):
    out, bert = tmp_path / "grid", name == "bert"
    axes = ["--criteria", "random,obs", "--reconstructions", "none,liar", "--sparsities", "0.5"]
    arguments = _arguments(inputs, out, *axes, *GRIDS[name], bert=bert)
    if name == "bf16":
        arguments[1] = str(bf16)
    assert main(arguments) == 0
    cells = _result(out)["cells"]
    assert len(cells) == dict(zip(GRIDS, (8, 8, 1, 4, 4), strict=True))[name]
    for number, cell in enumerate(cells):
        recipe, folder = tmp_path / f"{number}.json", tmp_path / f"{number}"
        recipe.write_text(json.dumps(cell["recipe"]))
        prune = ["prune", arguments[1], "--out", str(folder), "--recipe", str(recipe), "--json"]
        assert main(prune) == 0
        report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        file = str(inputs.stsb if bert else inputs.other)
        measured = ["--stsb" if bert else "--text", file, "--seq-len", "32", "--json"]
        assert main(["eval", str(folder), *measured, "--dense", arguments[1]]) == 0
        found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        (own,) = cell["metrics"].values()
        assert own["value"] == found["value"], cell
        assert [*cell["difference"].values()] == [found["difference"]]
        assert all(one["paired"] for one in found["difference"].values())
        residuals = [site["relative_residual"] for site in report["sites"]]
        assert cell["residual"]["max"] == max(residuals)
        removed = report["totals"]["parameters_before"] - report["totals"]["parameters_after"]
        assert cell["parameters_removed"] == removed
        assert cell["layout"] == report["layout"]


def test_the_folder_holds_json_tables_and_a_plot_for_each_target_and_allocation(
    inputs, tmp_path, capsys
):
    out = tmp_path / "grid"
    axes = ["--sparsities", "0.25,0.5", "--targets", "ffn;heads", "--reconstructions", "none,liar"]
    assert _compare(inputs, out, *axes, "--json") == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result == _result(out)
    names = {"grid.json", "cells.jsonl", "comparison.json", "comparison.md"}
    plots = {"plot-ffn-uniform.svg", "plot-heads-uniform.svg"}
    assert {path.name for path in out.iterdir()} == names | plots
    for name in plots:
        assert xml.fromstring((out / name).read_text()).tag.endswith("svg")
    assert result["environment"]["torch"] == torch.__version__
    assert result["counts"] == {"done": 8, "failed": 0, "skipped": 0, "computed": 8}
    for cell in result["cells"]:
        assert cell["seconds"].keys() >= {"forward", "gram", "solve", "total", "evaluation"}
        total = cell["seconds"]["total"]
        assert cell["relative_to_forward"] == total / result["dense"]["forward_seconds"]
        assert cell["peak_host_bytes"] > 0
    text = (out / "comparison.md").read_text()
    assert "## FFN, uniform" in text and "## heads, uniform" in text
    best = min(
        next(iter(c["metrics"].values()))["value"]
        for c in result["cells"]
        if c["target"] == ["ffn"] and c["sparsity"] == 0.5
    )
    assert f"| **{best:.2f}** (" in text
    # each sparsity of each table has its best, and only that: the header's is the dense one
    assert text.count("**") == 2 * (1 + 4)
    for cell in result["cells"]:
        ((change,),) = [one.values() for one in cell["difference"].values()]
        assert f"| {signed(change)} |" in text


def test_cells_of_a_sparsity_are_compared_with_the_best_of_it(inputs, tmp_path):
    """On the same windows: the interval is of what differs, and a tie is marked as one."""
    out = tmp_path / "grid"
    axes = ["--sparsities", "0.25,0.5", "--reconstructions", "none,liar", "--criteria", "wanda,obs"]
    assert _compare(inputs, out, *axes) == 0
    result, text = _result(out), (out / "comparison.md").read_text()
    ledger = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    (name,) = result["evaluations"]
    figures = {
        (one["recipe"]["sparsity"], one["recipe"]["criterion"], one["recipe"]["reconstruct"]): (
            one["metrics"][name]["value"],
            np.array(one["units"][name]["figures"]["perplexity"]["values"]),
        )
        for one in ledger[1:]
    }
    tied = 0
    for cell in result["cells"]:
        assert "units" not in cell
        own = figures[cell["sparsity"], cell["criterion"], cell["reconstruct"]]
        rivals = [one for key, one in figures.items() if key[0] == cell["sparsity"]]
        best = min(rivals, key=lambda one: one[0])
        change = cell["from_best"][name]
        if own is best:
            assert change is None
            continue
        assert change["value"] == own[0] - best[0] > 0
        error = np.std(own[1] - best[1], ddof=1) / len(own[1]) ** 0.5
        assert change["standard_error"] == pytest.approx(error, rel=1e-12)
        low, high = change["confidence_interval"]
        tied += low <= 0 <= high
        mark = " ≈" if low <= 0 <= high else ""
        assert f"| {own[0]:.2f}{mark} ({cell['residual']['mean']:.3f})" in text
    assert text.count(" ≈ (") == tied


@pytest.mark.parametrize("statistics", ["sequential", "oneshot"])
def test_what_was_killed_and_resumed_is_what_was_not(inputs, tmp_path, monkeypatch, statistics):
    axes = ["--sparsities", "0.25,0.5", "--allocations", "uniform,global"]
    axes += ["--reconstructions", "none,liar", "--statistics", statistics]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert _compare(inputs, whole, *axes) == 0
    assert _compare(inputs, cut, *axes, "--keep-moments") == 0
    # what a kill leaves: whole lines, half a line, Moments, hidden states, and no result
    for path in (cut / "comparison.json", cut / "comparison.md", *cut.glob("*.svg")):
        path.unlink()
    lines = (cut / "cells.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 9
    (cut / "cells.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    (cut / ".scratch-1").mkdir()
    computed = []
    plain = Subject.measure
    monkeypatch.setattr(
        Subject, "measure", lambda self, cell, *a: computed.append(cell) or plain(self, cell, *a)
    )
    assert _compare(inputs, cut, *axes, "--resume") == 0
    assert len(computed) == 5
    assert _lasting(_result(cut)) == _lasting(_result(whole))
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in cut.iterdir()} == names
    for name in names:
        if name.endswith(".svg"):
            assert (cut / name).read_text() == (whole / name).read_text()
    # nothing is left to do, and the result is made again from what is there
    del computed[:]
    assert _compare(inputs, cut, *axes, "--resume") == 0
    assert not computed


def test_an_interrupt_keeps_what_is_finished_and_resume_goes_on(
    inputs, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "grid"
    axes = ["--sparsities", "0.25,0.5"]
    plain = Subject.measure

    def measure(self, cell, *rest):
        if cell.recipe.sparsity == 0.5:
            raise KeyboardInterrupt
        return plain(self, cell, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Subject, "measure", measure)
        assert _compare(inputs, out, *axes) == 2
    assert "interrupted after 1 of 2 cells; --resume goes on" in _error(capsys)
    assert not (out / "comparison.json").exists()
    assert _compare(inputs, out, *axes) == 2
    assert "holds an unfinished comparison" in _error(capsys)
    assert _compare(inputs, out, *axes, "--resume") == 0
    assert _result(out)["counts"]["done"] == 2


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(inputs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "grid"
    axes = ["--reconstructions", "none,liar,bias"]
    plain = Subject._pruned

    def pruned(self, recipe, *rest):
        if recipe.reconstruct == "liar":
            raise ZeroDivisionError("by\nnothing")
        return plain(self, recipe, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Subject, "_pruned", pruned)
        assert _compare(inputs, out, *axes, "--json") == 1
    captured = capsys.readouterr()
    assert "error: 1 of 3 cells failed, the first: ZeroDivisionError: by nothing" in captured.err
    result = json.loads(captured.out.strip().splitlines()[-1])
    assert [cell["status"] for cell in result["cells"]] == ["done", "failed", "done"]
    assert "liar ridge 0.0001: ZeroDivisionError: by nothing" in (out / "comparison.md").read_text()
    # the cause is gone: only what failed is computed
    assert _compare(inputs, out, *axes, "--resume") == 0
    assert _result(out)["counts"] == {"done": 3, "failed": 0, "skipped": 0, "computed": 3}
    assert (out / "cells.jsonl").read_text().count("\n") == 5


def test_more_cells_can_be_asked_for_later(inputs, tmp_path, capsys):
    out, whole = tmp_path / "grid", tmp_path / "whole"
    assert _compare(inputs, out, "--sparsities", "0.5") == 0
    assert _compare(inputs, out, "--sparsities", "0.25,0.5", "--resume") == 0
    assert "2 cells, 1 done before" in capsys.readouterr().err
    assert _compare(inputs, whole, "--sparsities", "0.25,0.5") == 0
    assert _lasting(_result(out)) == _lasting(_result(whole))


def test_passes_are_shared_where_they_can_be(inputs, tmp_path, monkeypatch):
    entered = []
    plain = Driver._enter
    monkeypatch.setattr(Driver, "_enter", lambda self, p: entered.append(p) or plain(self, p))
    asked = []
    obs = CRITERIA["obs"]

    def choose(evidence):
        asked.append(evidence.site.name)
        return obs.choose(evidence)

    from dataclasses import replace

    monkeypatch.setitem(CRITERIA, "obs", replace(obs, choose=choose))
    axes = ["--targets", "ffn;ffn,heads", "--criteria", "wanda,obs"]
    axes += ["--reconstructions", "none,liar", "--allocations", "uniform,global"]
    assert _compare(inputs, tmp_path / "oneshot", *axes, "--statistics", "oneshot") == 0
    assert len(entered) == 1, "one forward for 16 cells"
    # a Site is judged once for each number of units, not for each reconstruction
    by_two = [name for name in asked if name.endswith("down_proj")]
    assert len(by_two) <= 2 * 2 * 2
    del entered[:]
    assert _compare(inputs, tmp_path / "sequential", *axes[:2], *axes[4:]) == 0
    assert len(entered) == 8 + 1, "and one more for the scores of all allocations"
    del entered[:]
    assert _compare(inputs, tmp_path / "ridges", "--ridges", "0.1,1e-3", *axes[4:6]) == 0
    assert len(entered) == 3
    result = _result(tmp_path / "ridges")
    assert result["counts"]["computed"] == 3
    assert [cell["same_as"] is None for cell in result["cells"]] == [True, False, True, True]
    assert (
        "liar, ridge 0.1 | liar, ridge 0.001" in (tmp_path / "ridges" / "comparison.md").read_text()
    )


def test_levels_of_searches_are_made_once_for_all_cells(inputs, tmp_path, monkeypatch):
    made = []
    level = Repairer.level

    def counting(self, site, moments, keep, *notes, **given):
        made.append((site.name, len(keep), self._recipe.reconstruct))
        return level(self, site, moments, keep, *notes, **given)

    monkeypatch.setattr(Repairer, "level", counting)
    axes = ["--allocations", "uniform,spdy,evolution", "--sparsities", "0.25,0.5"]
    axes += ["--search-evaluations", "4", "--reconstructions", "none,liar"]
    assert _compare(inputs, tmp_path / "grid", *axes) == 0
    assert len(made) == len(set(made)) == 2 * 2 * 12, "reconstructions, layers, widths"
    counts = _result(tmp_path / "grid")["counts"]
    assert (counts["failed"], counts["computed"]) == (0, 12)


def test_what_is_impossible_is_skipped_with_a_line(inputs, tmp_path, capsys):
    out = tmp_path / "grid"
    assert _compare(inputs, out, "--reconstructions", "bias,liar", "--bias", "never") == 0
    assert "skipped ffn uniform 0.3 wanda bias" in capsys.readouterr().err
    result = _result(out)
    assert result["counts"] == {"done": 1, "failed": 0, "skipped": 1, "computed": 1}
    assert "--bias is never" in result["skipped"][0]["reason"]
    assert "--bias is never" in (out / "comparison.md").read_text()


ONE = ["--samples", "1", "--reconstructions", "mask-tuning"]
IMPOSSIBLE = {
    "norms": (["--target-signals", "local,stream"], "local", "--target-signal stream: this bert"),
    "loss": (["--criteria", "wanda,snip"], "wanda", "--criterion snip"),
    "held out": (["--ridges", "0.1,auto", *ONE], "0.1", "--ridge auto: holds out"),
    "budget": (["--sparsities", "0.3,0.9999"], "0.3", "--sparsity 0.9999: every layer keeps"),
    "tokens": (["--reconstructions", "none,liar", "--samples", "1"], "none", "calibration tokens"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_a_model_cannot_is_skipped_before_anything_is_computed(
    inputs, tmp_path, capsys, monkeypatch, name
):
    """Once, with the reason; where nothing else is asked for, it is refused."""
    options, left, says = IMPOSSIBLE[name]
    computed = []
    plain = Subject.measure

    def measure(self, cell, *rest):
        computed.append(cell)
        return plain(self, cell, *rest)

    monkeypatch.setattr(Subject, "measure", measure)
    out = tmp_path / "grid"
    assert _compare(inputs, out, *options, bert=True) == 0
    assert capsys.readouterr().err.count("skipped ") == 1
    result = _result(out)
    assert result["counts"] == {"done": 1, "failed": 0, "skipped": 1, "computed": 1}
    assert says in result["skipped"][0]["reason"]
    assert len(computed) == 1
    assert left in map(str, computed[0].coordinates.values())
    axis, values, *rest = options
    (other,) = (value for value in values.split(",") if value != left)
    assert _compare(inputs, tmp_path / "none", axis, other, *rest, bert=True) == 2
    error = _error(capsys)
    assert "no combination of the axes is possible" in error
    assert says in error
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--criteria", "wanda,magic"], "--criteria magic: choose from magnitude, "),
        (["--sparsities", "0.3,1.5"], "--sparsities 1.5: "),
        (["--targets", "ffn;ffn"], "--targets ffn: is given twice"),
        (["--ridge", "-1"], "--ridge -1.0"),
        (["--layers", "0:9"], "--layers 0:9: the model has 2 layers"),
        (["--eval", "text=nowhere.txt"], "--eval text=nowhere.txt: no such file"),
        (
            ["--eval", "bleu=x"],
            "--eval bleu=x: give text=FILE, kl=FILE, stsb=FILE.csv",
        ),
        (["--eval", "stsb={stsb}"], "is evaluated with text=FILE"),
        (["--eval-windows", "0"], "--eval-windows 0: must be at least 1"),
        (["--eval-seq-len", "1"], "--eval-seq-len 1: must be at least 2"),
        (["--eval", "text={short}"], "the evaluation text has 3 tokens"),
        (["--calibration", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--hidden-states", "cloud"], "--hidden-states cloud: choose from"),
        (["--resume", "--overwrite"], "give one of them"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(inputs, tmp_path, capsys, options, says):
    (tmp_path / "short.txt").write_text("the list of")
    places = {"stsb": inputs.stsb, "short": tmp_path / "short.txt"}
    out = tmp_path / "grid"
    assert _compare(inputs, out, *(option.format(**places) for option in options)) == 2
    assert says in _error(capsys)
    assert not out.exists()


def test_a_missing_evaluation_and_torchrun_are_refused(inputs, tmp_path, capsys, monkeypatch):
    arguments = _arguments(inputs, tmp_path / "grid")
    at = arguments.index("--eval")
    assert main(arguments[:at] + arguments[at + 2 :]) == 2
    assert "--eval is missing" in _error(capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2
    assert "WORLD_SIZE is 2" in _error(capsys)


def test_resume_refuses_by_name_what_the_figures_depend_on(inputs, tmp_path, capsys, monkeypatch):
    source, text, other, out = (tmp_path / n for n in ("source", "t.txt", "o.txt", "grid"))
    shutil.copytree(inputs.llama, source)
    shutil.copy(inputs.text, text)
    shutil.copy(inputs.other, other)

    def run(*options: str) -> int:
        fixed = [*FIXED, "--eval", f"text={other}", "--eval-seq-len", "32"]
        place = ["--out", str(out), "--calibration", str(text)]
        return main(["compare", str(source), *place, *fixed, *options])

    assert run() == 0
    before = tree_hash(out)
    capsys.readouterr()
    for options, named in (
        (["--samples", "23"], "recipe.samples is 23, and 24 in"),
        (["--seed", "1"], "recipe.seed is 1, and 0 in"),
        (["--eval-windows", "2"], "windows is 2, and null in"),
        (["--statistics", "oneshot"], 'recipe.statistics is "oneshot"'),
    ):
        assert run("--resume", *options) == 2
        assert named in _error(capsys)
    for file, change, named in (
        (text, lambda data: data.replace(b"the", b"key", 1), "calibration.corpus_sha256 is"),
        (other, lambda data: data.replace(b"the", b"key", 1), f"text={other}.sha256 is"),
        (source / "model.safetensors", lambda data: data[:-1] + b"\0", "source_sha256.model.s"),
    ):
        good = file.read_bytes()
        file.write_bytes(change(good))
        assert file.read_bytes() != good
        assert run("--resume") == 2
        assert named in _error(capsys)
        file.write_bytes(good)
    with monkeypatch.context() as patch:
        patch.setattr("liar_ext.environment.__version__", "0.0.0")
        assert run("--resume") == 2
        assert 'versions.liar_ext is "0.0.0"' in _error(capsys)
    assert tree_hash(out) == before
    assert run() == 2
    assert "holds a comparison; --resume goes on with it, --overwrite starts again" in _error(
        capsys
    )
    assert run("--overwrite", "--seed", "1") == 0


def test_windows_limit_the_text_and_several_texts_have_a_table_each(inputs, tmp_path):
    out = tmp_path / "grid"
    texts = ["--eval", f"text={inputs.other}", "--eval", f"text={inputs.text}"]
    options = [*texts, "--eval-seq-len", "16", "--eval-windows", "3", "--eval-batch-size", "2"]
    assert _compare(inputs, out, *options) == 0
    result = _result(out)
    assert [m["windows"] for m in result["cells"][0]["metrics"].values()] == [3, 3]
    assert {path.name for path in out.glob("*.svg")} == {
        "plot-ffn-uniform-1.svg",
        "plot-ffn-uniform-2.svg",
    }
    # it was calibrated on one of them
    assert any("this is not a held-out number" in text for text in result["warnings"])


def test_a_recipe_file_gives_what_no_option_says(inputs, tmp_path):
    recipe, out = tmp_path / "recipe.json", tmp_path / "grid"
    recipe.write_text(json.dumps({"criterion": "flap", "sparsity": 0.5, "seed": 3}))
    assert _compare(inputs, out, "--recipe", str(recipe), "--sparsities", "0.25") == 0
    (cell,) = _result(out)["cells"]
    assert (cell["criterion"], cell["sparsity"], cell["recipe"]["seed"]) == ("flap", 0.25, 3)


def test_hidden_states_on_disk_change_nothing_and_leave_nothing(inputs, tmp_path):
    for place in ("device", "disk"):
        assert _compare(inputs, tmp_path / place, "--hidden-states", place) == 0
    assert _lasting(_result(tmp_path / "disk")) == _lasting(_result(tmp_path / "device"))
    assert tree_hash(tmp_path / "disk").keys() == tree_hash(tmp_path / "device").keys()


def test_pruning_a_twin_leaves_the_model_as_it_is(inputs):
    model = liar_ext.load(inputs.llama)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = outputs(model, torch.arange(16)[None])
    copy = twin(model)
    recipe = liar_ext.Recipe(sparsity=0.5, target=("ffn", "heads"), bias="always")
    liar_ext.prune(copy, [torch.arange(16).repeat(8, 1)], recipe)
    assert copy.model.layers[0].mlp.down_proj.weight.shape[1] == 24
    assert copy.model.embed_tokens.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(outputs(model, torch.arange(16)[None]), expected)


def test_a_ridge_that_is_chosen_on_an_axis_is_the_one_of_prune(inputs, tmp_path):
    """One batch would leave nothing to hold out: each cell cuts its own."""
    arguments = ["--samples", "24", "--seq-len", "32", "--batch-size", "32", "--device", "cpu"]
    grid = ["--ridges", "1e-4,auto", "--sparsities", "0.5", "--statistics", "oneshot"]
    out = tmp_path / "grid"
    shown = ["--eval", f"text={inputs.other}", "--eval-seq-len", "32"]
    calibration = ["--calibration", str(inputs.text)]
    source = str(inputs.llama)
    command = ["compare", source, "--out", str(out), *calibration, *arguments, *grid, *shown]
    assert main(command) == 0
    cells = json.loads((out / "comparison.json").read_text())["cells"]
    assert [cell["recipe"]["ridge"] for cell in cells] == [1e-4, "auto"]
    for cell in cells:
        pruned = tmp_path / str(cell["recipe"]["ridge"])
        ridge = ["--ridge", str(cell["recipe"]["ridge"]), "--statistics", "oneshot"]
        options = [*calibration, *arguments, *ridge, "--sparsity", "0.5"]
        assert main(["prune", source, "--out", str(pruned), *options]) == 0
        report = json.loads((pruned / "liar_report.json").read_text())
        residuals = [site["relative_residual"] for site in report["sites"]]
        assert cell["residual"]["max"] == max(residuals)
        assert list(cell["ridges"].values()) == [site["ridge_used"] for site in report["sites"]]


def test_allocations_that_solve_depend_on_the_ridge(inputs):
    grid = make_grid(
        Recipe(calibration=str(inputs.text)),
        {
            "ridges": (1e-4, 1.0),
            "allocations": ("levels", "global"),
            "reconstructions": ("none",),
        },
    )
    # the two of `global` are one computation, those of `levels` are not
    assert len(grid.computations()) == 3


def test_a_preset_aims_where_the_reconstructions_of_the_grid_can(inputs, tmp_path, capsys):
    """`best` aims at the residual stream; a grid without a fit to it has local targets instead."""
    few = ["--preset", "best", "--allocations", "uniform", "--sparsities", "0.5"]
    assert _compare(inputs, tmp_path / "none", *few, "--reconstructions", "none,bias") == 0
    cells = _result(tmp_path / "none")["cells"]
    assert {cell["recipe"]["target_signal"] for cell in cells} == {"local"}
    assert [cell["recipe"]["reconstruct"] for cell in cells] == ["none", "bias"]
    assert _compare(inputs, tmp_path / "both", *few, "--reconstructions", "none,liar") == 0
    result = _result(tmp_path / "both")
    assert [cell["recipe"]["target_signal"] for cell in result["cells"]] == ["stream"]
    assert "stream with --reconstruct none" in result["skipped"][0]["reason"]


def test_parts_may_go_with_the_allocations_that_can(inputs, tmp_path, capsys):
    """What is the same in all cells has an allocation, too, and `uniform` refuses `--empty`."""
    options = ["--empty", "--sparsities", "0.5", "--targets", "ffn,heads"]
    out = tmp_path / "grid"
    assert _compare(inputs, out, *options, "--allocations", "uniform,levels") == 0
    result = _result(out)
    assert [cell["recipe"]["allocation"] for cell in result["cells"]] == ["levels"]
    assert result["cells"][0]["recipe"]["empty"]
    assert "--empty with --allocation uniform" in result["skipped"][0]["reason"]
    assert _compare(inputs, tmp_path / "none", *options, "--allocations", "uniform") == 2
    assert "--empty with --allocation uniform" in _error(capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ridges", "1e-4", "--ridge", "auto"], "--ridges with --ridge: both say which"),
        (
            ["--target-signals", "local", "--target-signal", "dense"],
            "--target-signals with --target",
        ),
    ],
)
def test_an_axis_and_an_option_for_one_field_are_refused(inputs, tmp_path, capsys, options, words):
    assert _compare(inputs, tmp_path / "out", *options) == 2
    assert words in _error(capsys)


def test_an_option_of_prune_names_its_axis(inputs, tmp_path, capsys):
    assert _compare(inputs, tmp_path / "grid", "--sparsity", "0.5") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "--sparsity: liar compare has --sparsities for it" in line
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(Recipe(drop_layers=(1,)).to_json()))
    options = ["--recipe", str(recipe), "--sparsities", "0.5"]
    assert _compare(inputs, tmp_path / "grid", *options) == 2
    assert "leave out layers first" in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_warnings_of_cells_are_on_the_page_once(inputs, tmp_path):
    """Widths that come no closer: both reconstructions of a cell say so."""
    axes = ["--sparsities", "0.4", "--targets", "heads", "--reconstructions", "none,liar"]
    assert _compare(inputs, tmp_path / "grid", *axes) == 0
    result = _result(tmp_path / "grid")
    assert all(cell["warnings"] for cell in result["cells"])
    text = (tmp_path / "grid" / "comparison.md").read_text()
    for cell in result["cells"]:
        for warning in cell["warnings"]:
            assert text.count(warning) == 1


def test_parts_may_go_in_a_grid(tmp_path, capsys):
    """The base recipe has an allocation of its own, which is no part of the grid."""
    words = ["compare", str(MODEL), "--out", str(tmp_path / "out"), "--calibration"]
    words += [str(CALIBRATION), "--eval", f"text={HELDOUT}", "--eval-windows", "2"]
    words += ["--eval-seq-len", "64", "--samples", "8", "--seq-len", "64", "--sparsities", "0.5"]
    words += ["--allocations", "global,uniform", "--empty", "--criteria", "wanda", "--json"]
    assert main([*words, "--reconstructions", "none"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [cell["allocation"] for cell in result["cells"]] == ["global"]
    assert "uniform" in json.dumps(result["skipped"])
