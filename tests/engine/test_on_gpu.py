"""Every method end to end on a GPU: the widths, what is kept and the residuals of the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from liar_families import FAMILIES, outputs, write_tokens

import liar_ext
from liar_ext import InputError, Recipe
from liar_ext.allocation import ALLOCATIONS
from liar_ext.criteria import CRITERIA
from liar_ext.recipe import CHOICES
from liar_ext.reconstruction import RECONSTRUCTIONS

METHODS = [
    *(("criterion", name) for name in CRITERIA),
    *(("reconstruct", name) for name in RECONSTRUCTIONS),
    *(("allocation", name) for name in ALLOCATIONS),
    *(("target_signal", name) for name in CHOICES["target_signal"]),
    ("statistics", "oneshot"),
    ("ridge", "auto"),
    ("preset", "best"),
    ("preset", "fast"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("on-gpu")
    write_tokens(root / "tokens.npy")
    FAMILIES["llama-gqa-biases"].build().save_pretrained(root / "dense")
    return root


def recipe_of(source, field, name):
    fields = {
        "calibration": str(source / "tokens.npy"),
        "seq_len": 24,
        "samples": 24,
        "batch_size": 4,
        "sparsity": 0.5,
        "target": ("ffn", "heads"),
        "dtype": "float32",
        "search_samples": 6,
        "search_evaluations": 12,
        "policy_steps": 8,
    }
    if field == "preset":
        return liar_ext.preset(name, source / "dense", **fields)
    return Recipe(**{**fields, field: name})


@pytest.mark.gpu
@pytest.mark.parametrize(("field", "name"), METHODS, ids=lambda part: part)
def test_a_gpu_makes_what_the_cpu_makes(source, tmp_path, field, name):
    """What learns or searches (float32 losses in another order decide) may end elsewhere: its
    budget and that the result can be used are checked."""
    try:
        recipe = recipe_of(source, field, name)
    except InputError as error:
        pytest.skip(str(error))
    made = {}
    for device in ("cpu", "cuda"):
        made[device] = liar_ext.compress(
            source / "dense", tmp_path / device, replace(recipe, device=device)
        )
    there, here = made["cuda"], made["cpu"]
    assert there.totals["sparsity"] == pytest.approx(here.totals["sparsity"], abs=0.03)
    model = liar_ext.load(tmp_path / "cuda")
    assert bool(torch.isfinite(outputs(model)).all())
    searched = name == "policy" or (field == "allocation" and ALLOCATIONS[name].search is not None)
    if searched or (field, name) == ("preset", "best"):
        return
    for one, other in zip(there.sites, here.sites, strict=True):
        assert (one.name, one.units_after) == (other.name, other.units_after)
        assert one.relative_residual == pytest.approx(other.relative_residual, rel=0.02, abs=1e-4)
