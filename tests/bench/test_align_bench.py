"""`liar bench align` and `--round-to auto`: what a device likes, and what is done with it."""

from __future__ import annotations

import json

import pytest

from liar_ext import InputError, alignment
from liar_ext.alignment import granule, round_to_for, wanted
from liar_ext.bench import align
from liar_ext.bench.align import BASE, EACH, POWERS, TOLERANCE, judge, widths
from liar_ext.cli import main
from liar_ext.demo import CALIBRATION, MODEL


def seconds(slow: dict[int, float], noise: float = 0.0) -> dict[int, dict[int, list[float]]]:
    """A device on which a width takes 1 µs and 1 ns a column, times `slow` of its power of two."""
    found = {}
    for power, own in widths(7680).items():
        base = {width: (1e-6 + 1e-9 * width) * slow.get(power, 1.0) for width in own}
        # another process now and then: it only adds, and the quiet fifth is right
        found[power] = {w: [t, t, t * (1 + noise), t * (1 + 2 * noise)] for w, t in base.items()}
    return found


@pytest.mark.parametrize("width", [512, 1536, 5504, 7680, 11008])
def test_widths_are_multiples_of_their_power_alone_on_both_sides(width):
    found = widths(width)
    assert list(found) == [power for power in POWERS if power * 8 <= width]
    for power, own in found.items():
        assert len(own) == len(set(own)) <= EACH
        assert min(own) <= width < max(own)
        for each in own:
            assert each % power == 0
            assert power == max(found) or each // power % 2
        # none has the smaller ones, which take less
        assert abs(sum(own) / len(own) - width) < 4 * max(found)


def test_a_device_that_likes_all_widths():
    assert judge(seconds({}))["granule"] == 1
    assert judge(seconds({}, noise=1.0))["granule"] == 1


@pytest.mark.parametrize("likes", [8, 64])
def test_the_granule_is_the_least_power_that_is_not_slower(likes):
    slow = {power: 1.3 for power in POWERS if power < likes}
    for noise in (0.0, 0.8):
        found = judge(seconds(slow, noise))
        assert found["granule"] == likes
        by_power = {row["multiple"]: row["excess"] for row in found["classes"]}
        assert by_power[1]["median"] == pytest.approx(1.3, rel=1e-3)
        assert by_power[likes]["median"] == pytest.approx(1.0, rel=1e-3)


def test_a_single_slow_width_is_no_matter_of_alignment():
    found = seconds({})
    found[16][next(iter(found[16]))] = [1.0] * 4
    assert judge(found)["granule"] == 1


def test_below_the_tolerance_nothing_is_slow():
    assert judge(seconds({1: TOLERANCE - 0.01}))["granule"] == 1
    assert judge(seconds({1: TOLERANCE + 0.01}))["granule"] == 2


def test_the_command_writes_what_round_to_reads(tmp_path, capsys):
    file = tmp_path / "align.json"
    words = ["--hidden", "32", "--width", "64", "--tokens", "8", "--repeats", "2"]
    assert main(["bench", "align", *words, "--device", "cpu", "--out", str(file)]) == 0
    assert "FFN widths: multiples of " in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [own["phase"] for own in result["tables"]] == ["decode", "prefill"]
    assert [own["tokens"] for own in result["tables"]] == [1, 8]
    powers = [power for power in POWERS if power * 8 <= 64]
    for own in result["tables"]:
        assert [row["multiple"] for row in own["classes"]] == powers
        for row in own["classes"]:
            assert len(row["seconds"]["p50"]) == len(row["widths"])
    assert result["granule"] == max(own["granule"] for own in result["tables"]) <= powers[-BASE]
    assert wanted(str(file), "cpu") == result["granule"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--width", "16"], "--width 16: must be at least 32"),
        (["--hidden", "0"], "--hidden 0: must be at least 1"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, says, tmp_path, capsys):
    file = tmp_path / "align.json"
    assert main(["bench", "align", *words, "--device", "cpu", "--out", str(file)]) == 2
    assert says in capsys.readouterr().err
    assert not file.exists()


def test_a_lack_of_memory_names_the_options_to_lower(monkeypatch, tmp_path, capsys):
    def fails(*words):
        raise MemoryError

    monkeypatch.setattr(align, "measure", fails)
    words = ["bench", "align", "--device", "cpu", "--out", str(tmp_path / "a.json")]
    assert main(words) == 1
    assert "lower --hidden or --width" in capsys.readouterr().err


# -- what becomes of it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "expected"), [(11008, 64), (2048, 64), (1536, 32), (512, 16), (48, 1), (3, 1)]
)
def test_narrow_models_are_not_distorted(width, expected):
    assert granule(64, width) == expected
    # rounding to the nearest moves a width by half of it
    assert expected / 2 <= max(width / 64, 0.5)
    assert granule(1, width) == 1


def test_auto_is_the_default_of_the_device(monkeypatch):
    assert (wanted("auto", "cpu"), wanted("auto", "cuda")) == (16, 64)
    assert round_to_for("auto", MODEL, "cpu") == 16
    monkeypatch.setitem(alignment.DEFAULTS, "cpu", 8)
    assert round_to_for("auto", MODEL, "cpu") == 8
    assert round_to_for("24", "/nonexistent", "cpu") == 24


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no result of liar bench align"),
        ({"benchmark": "latency"}, "is no result of liar bench align"),
        ({"benchmark": "align", "version": 2}, "version 2; this release reads 1"),
        ({"benchmark": "align", "version": 1}, "its granule None is no number"),
        ({"benchmark": "align", "version": 1, "granule": 0}, "its granule 0 is no number"),
        ({"benchmark": "align", "version": 1, "granule": True}, "its granule True is no number"),
    ],
)
def test_files_that_say_nothing_are_refused(content, says, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=says):
        wanted(str(file), "cpu")


def test_pruning_takes_it_and_the_recipe_has_the_number(tmp_path, capsys):
    file, out = tmp_path / "align.json", tmp_path / "out"
    file.write_text(json.dumps({"benchmark": "align", "version": 1, "granule": 8}))
    words = ["--calibration", str(CALIBRATION), "--samples", "16", "--seq-len", "64"]
    words += ["--sparsity", "0.3", "--device", "cpu"]
    command = ["prune", str(MODEL), "--out", str(out), *words]
    assert main([*command, "--round-to", str(file)]) == 0
    assert f"--round-to {file}: multiples of 8\n" in capsys.readouterr().err
    assert json.loads((out / "recipe.json").read_text())["round_to"] == 8
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 360
    assert main(["plan", str(MODEL), *words, "--round-to", "auto", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["recipe"]["round_to"] == 16
    assert {site["units_after"] for site in plan["sites"]} == {352}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("0", "--round-to 0: must be a whole number of at least 1"),
        ("-3", "--round-to -3: must be a whole number of at least 1"),
        ("sixteen", "--round-to sixteen: neither a number nor auto, and no such file"),
    ],
)
def test_words_that_mean_nothing(word, says, capsys):
    assert main(["plan", str(MODEL), f"--round-to={word}", "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err


def test_jobs_of_many_models_need_a_number(tmp_path, capsys):
    (tmp_path / "jobs.jsonl").write_text("{}\n")
    assert main(["batch", str(tmp_path / "jobs.jsonl"), "--round-to", "auto"]) == 2
    assert "--round-to auto: jobs have models of their own" in capsys.readouterr().err
