"""Presets: what they fill in for which model, and what wins over them."""

from __future__ import annotations

import json

import pytest
from liar_families import UNLISTED
from transformers import BartConfig, BertConfig, GPT2Config, LlamaConfig, OPTConfig

import liar_ext
from liar_ext.cli import main
from liar_ext.cli.options import add_recipe_options, recipe_of
from liar_ext.demo import CALIBRATION, MODEL
from liar_ext.errors import InputError, UnsupportedModelError
from liar_ext.presets import PRESETS, preset_fields
from liar_ext.recipe import Recipe
from liar_ext.reconstruction import RECONSTRUCTIONS

PRE_NORM = (LlamaConfig(), GPT2Config(), OPTConfig(do_layer_norm_before=True))
POST_NORM = (BertConfig(), OPTConfig(do_layer_norm_before=False))


def kind(config):
    before = getattr(config, "do_layer_norm_before", None)
    return config.model_type + ("" if before is None else f"-{before}")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("config", [*PRE_NORM, *POST_NORM], ids=kind)
def test_every_preset_is_a_recipe_for_every_kind_of_model(name, config):
    found = Recipe(**preset_fields(name, config))
    assert found.reconstruct == "liar"
    stream = name == "best" and config in PRE_NORM
    sentences = name == "best" and config.model_type == "bert"
    assert found.search_samples == (256 if sentences else Recipe().search_samples)
    assert found.target_signal == ("stream" if stream else "local")


def test_an_unknown_preset_and_an_unsupported_model_are_refused():
    with pytest.raises(InputError, match="--preset better: choose from best, fast"):
        preset_fields("better", LlamaConfig())
    with pytest.raises(UnsupportedModelError):
        preset_fields("best", BartConfig())


def test_a_folder_and_fields_that_win():
    found = liar_ext.preset("best", MODEL, sparsity=0.5, target_signal="dense")
    assert found == Recipe(**{**PRESETS["best"].fields, "sparsity": 0.5, "target_signal": "dense"})


def test_a_traced_family_has_presets_too(tmp_path):
    UNLISTED["phi"].build().config.save_pretrained(tmp_path)
    found = liar_ext.preset("best", tmp_path, trace=True, sparsity=0.5)
    assert found == Recipe(
        **{**PRESETS["best"].fields, **PRESETS["best"].residual, "sparsity": 0.5}
    )
    with pytest.raises(UnsupportedModelError, match="not a family this version knows"):
        liar_ext.preset("best", tmp_path)


def test_an_unknown_preset_is_noticed_before_the_source_is_looked_for():
    with pytest.raises(InputError, match="--preset better: choose from"):
        liar_ext.preset("better", "nobody/has-this")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("reconstruct", RECONSTRUCTIONS)
@pytest.mark.parametrize("statistics", ["sequential", "oneshot"])
def test_repairs_and_statistics_win_over_a_preset_whatever_they_can_aim_at(
    name, reconstruct, statistics
):
    words = ["--preset", name, "--reconstruct", reconstruct, "--statistics", statistics]
    found = parsed(*words)
    assert (found.reconstruct, found.statistics) == (reconstruct, statistics)
    able = RECONSTRUCTIONS[reconstruct].follows and statistics == "sequential"
    assert found.target_signal == ("stream" if name == "best" and able else "local")
    assert liar_ext.preset(name, MODEL, reconstruct=reconstruct, statistics=statistics) == found
    if not able:
        with pytest.raises(InputError, match="--target-signal stream with"):
            parsed(*words, "--target-signal", "stream")


def parsed(*words):
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    add_recipe_options(parser)
    return recipe_of(parser.parse_args([str(MODEL), *words]))


def test_options_win_over_a_preset():
    assert parsed("--preset", "best").criterion == PRESETS["best"].fields["criterion"]
    assert parsed("--preset", "best", "--criterion", "flap").criterion == "flap"
    assert parsed("--preset", "best", "--criterion", "flap").target_signal == "stream"


def test_a_preset_and_a_recipe_are_not_both_given(tmp_path, capsys):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(Recipe().to_json()))
    words = ["plan", str(MODEL), "--recipe", str(file), "--preset", "best"]
    assert main(words) == 2
    assert "both say where to start" in capsys.readouterr().err


def test_the_report_of_a_run_has_what_the_preset_said(tmp_path):
    out = tmp_path / "out"
    words = ["--calibration", str(CALIBRATION), "--samples", "16", "--seq-len", "64"]
    words += ["--search-evaluations", "3", "--target", "heads"]
    assert main(["prune", str(MODEL), "--out", str(out), "--preset", "best", *words]) == 0
    recipe = json.loads((out / "recipe.json").read_text())
    wanted = {**PRESETS["best"].fields, **PRESETS["best"].residual, "search_evaluations": 3}
    assert {name: recipe[name] for name in wanted} == wanted


def test_jobs_name_presets_and_win_over_them(tmp_path):
    from liar_ext.jobs import read_jobs

    common = {"source": str(MODEL), "calibration": str(CALIBRATION)}
    lines = [
        {"out": "a"},
        {"out": "b", "preset": "fast"},
        {"out": "c", "criterion": "flap"},
        {"out": "d", "reconstruct": "bias"},
    ]
    file = tmp_path / "jobs.jsonl"
    file.write_text(
        "\n".join(json.dumps({**common, **x, "out": str(tmp_path / x["out"])}) for x in lines)
    )
    first, second, third, fourth = (
        job.recipe for job in read_jobs(file, {"sparsity": 0.4}, preset="best")
    )
    assert first == liar_ext.preset("best", MODEL, sparsity=0.4, calibration=str(CALIBRATION))
    assert second == liar_ext.preset("fast", MODEL, sparsity=0.4, calibration=str(CALIBRATION))
    assert third.criterion == "flap" and third.target_signal == first.target_signal
    assert fourth.reconstruct == "bias" and fourth.target_signal == "local"
