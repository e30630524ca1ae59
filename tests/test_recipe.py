"""Recipe: one object behind the command line, JSON and Python."""

from __future__ import annotations

import dataclasses
import json

import pytest

from liar_ext import InputError, Recipe


def test_json_there_and_back_is_the_same_recipe(tmp_path):
    recipe = Recipe(
        sparsity=0.4, target=("heads", "ffn"), layers=(1, 3), calibration="a.txt", seed=7
    )
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe.to_json()))
    assert Recipe.read(file) == recipe
    assert recipe.to_json() == json.loads(file.read_text())
    assert recipe.to_json()["version"] == 1


def test_a_path_is_a_calibration(tmp_path):
    assert Recipe(calibration=tmp_path / "a.txt") == Recipe(calibration=str(tmp_path / "a.txt"))


def test_it_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().sparsity = 0.9  # type: ignore[misc]
    assert hash(Recipe()) == hash(Recipe())


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sparsity": 0}, "--sparsity 0: must be"),
        ({"sparsity": float("nan")}, "--sparsity nan"),
        ({"sparsity": "0.3"}, "--sparsity '0.3'"),
        ({"sparsity": True}, "--sparsity True"),
        ({"target": ()}, "--target (empty)"),
        ({"target": ("ffn", "ffn")}, "each once"),
        ({"criterion": "none"}, "wanda, flap, flap-ifv, flap-wifn, rcpu"),
        (
            {"reconstruct": "magic"},
            "none, bias, mask-tuning, rotation, rotation-scaled, admm, liar",
        ),
        ({"allocation": "magic"}, "uniform, global"),
        ({"target_signal": "teacher"}, "choose from local, dense, stream"),
        ({"target_signal": "dense", "statistics": "oneshot"}, "use --statistics sequential"),
        ({"target_signal": "dense", "reconstruct": "bias"}, "use --reconstruct liar, or local"),
        ({"target_signal": "dense", "reconstruct": "none"}, "with --reconstruct none"),
        ({"target_signal": "stream", "statistics": "oneshot"}, "stream with --statistics oneshot"),
        ({"target_signal": "stream", "reconstruct": "bias"}, "use --reconstruct liar, or local"),
        ({"samples": 1.5}, "--samples 1.5"),
        ({"batch_size": True}, "--batch-size True"),
        ({"ridge": float("nan")}, "--ridge nan"),
        ({"seed": 2**63}, "--seed"),
        ({"ridge": True}, "--ridge True"),
        ({"ridge": "best"}, "--ridge best: must be a number of at least 0, e.g. 1e-3, or auto"),
        ({"ridge": "1e-3"}, "--ridge 1e-3: must be"),
        ({"ridge": None}, "--ridge None"),
        ({"seed": True}, "--seed True"),
        ({"layers": (3, 3)}, "--layers 3:3"),
        ({"layers": (0.5, 2)}, "--layers 0.5:2"),
        ({"layers": (0, 1, 2)}, "--layers 0:1:2"),
        ({"layers": "01"}, "--layers 0:1"),
        ({"calibration": 5}, "--calibration 5"),
        ({"round_to": 0}, "--round-to 0"),
        ({"seq_len": "128"}, "--seq-len 128"),
        ({"reconstruct": "bias", "bias": "never"}, "--reconstruct bias"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_bad_values_are_named_with_what_is_possible(values, says):
    with pytest.raises(InputError) as caught:
        Recipe(**values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"sparsty": 0.3}, "unknown key sparsty"),
        ({"version": 2}, "version 2"),
        ([], "must be a JSON object"),
        ({"layers": 3}, "my.json"),
        ({"target": 3}, "my.json"),
    ],
    ids=str,
)
def test_json_that_is_no_recipe_is_refused(data, says):
    with pytest.raises(InputError, match=says):
        Recipe.from_json(data, "my.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(InputError, match=name):
            Recipe.read(tmp_path / name)
