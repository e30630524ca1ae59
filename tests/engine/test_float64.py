"""Models that compute in float64: as their float32 twins, up to the rounding of float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from liar_families import FAMILIES, batches_of, write_tokens

import liar_ext
from liar_ext import Recipe

CASES = [
    {},
    {"statistics": "oneshot"},
    {"target_signal": "dense"},
    {"target_signal": "stream", "ridge": "auto"},
    {"criterion": "taylor-mixed", "allocation": "ranked"},
    {"criterion": "policy", "policy_steps": 2},
    {"allocation": "spdy", "search_evaluations": 3, "search_samples": 4},
]


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(map(str, c.values())) or "plain")
def test_a_model_in_float64_has_statistics_in_float64(tmp_path, changes):
    recipe = Recipe(
        calibration=str(write_tokens(tmp_path / "t.npy")),
        samples=24,
        seq_len=24,
        batch_size=8,
        sparsity=0.5,
        reconstruct="liar",
    )
    recipe = dataclasses.replace(recipe, **changes)
    found = {}
    for dtype in (torch.float32, torch.float64):
        model = FAMILIES["llama-mha"].build().to(dtype)
        report = liar_ext.prune(model, batches_of(recipe, decoder=True), recipe)
        # sums that began in float64 were not repeated
        assert not [step for site in report.sites for step in site.steps]
        found[dtype] = model.model.layers[1].mlp.down_proj.weight.detach()
    single, double = found[torch.float32], found[torch.float64]
    assert double.dtype == torch.float64
    assert (double - single).norm() < 1e-3 * double.norm()
