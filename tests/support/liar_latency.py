"""Tables of latencies that nobody measured: the same seconds on every machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from liar_ext.bench.latency import grid
from liar_ext.latency import VERSION, shape_of
from liar_ext.models import adapter_for, text_config

# what one unit takes, and all of them, in microseconds
FIXED = {"ffn": (40.0, 240.0), "heads": (90.0, 170.0)}


def table_data(model: PreTrainedModel, **changes: Any) -> dict[str, Any]:
    """A file of a model's shapes, as `liar bench latency` writes one; seconds are convex."""
    adapter = adapter_for(model.config)
    tables: dict[str, Any] = {}
    for layer in range(len(adapter.layer_list(model)[1])):
        for site in adapter.sites_of(model, layer, ("ffn", "heads")):
            shape = shape_of(site, model.config)
            units = grid(site.kind, site.units, 7)
            low, high = FIXED[site.kind]
            span = max(units[-1] - 1, 1)
            times = [1e-6 * (low + (high - low) * ((u - 1) / span) ** 1.5) for u in units]
            seconds = dict.fromkeys(("p20", "p50", "p80"), times)
            tables.setdefault(repr(shape), {"shape": shape, "units": units, "seconds": seconds})
    return {
        "benchmark": "latency",
        "version": VERSION,
        "source": "somewhere",
        "model_type": text_config(model.config).model_type,
        "attention": "sdpa",
        "device": "An Imagined Accelerator",
        "device_type": "cpu",
        "dtype": "bfloat16",
        "workload": {"mode": "prefill", "batch": 4, "seq_len": 2048},
        "date": "2026-01-31",
        "environment": {"liar_ext": "0.1.0", "torch": "2.13.0", "threads": 2},
        "tables": list(tables.values()),
        **changes,
    }


def write_table(path: Path, model: PreTrainedModel, **changes: Any) -> str:
    path.write_text(json.dumps(table_data(model, **changes)))
    return str(path)
