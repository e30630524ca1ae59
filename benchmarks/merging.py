"""Layers of the demo LLaMA merged: held-out perplexity, and layers that were run.

    python benchmarks/merging.py --json FILE

Every cell is `liar merge` and `liar eval --seq-len 256`. Beside them each layer is left out by
itself, and the last ones together; `telescope` with `--norms rule` leaves out the layers that the
search finds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import liar_ext
from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
from liar_ext.depth import MergeSettings, drop_layers, merge_layers
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.environment import environment
from liar_ext.evaluation.perplexity import perplexity, tokenize

LAYERS, SEQ_LEN = 5, 256
DROPS = (1, 2, 3)


RULES = (("telescope", "base"), ("rdsc", "base"), ("mean", "rule"), ("telescope", "rule"))
OTHERS = ({"similarity": "token"}, {"texts": 64}, {"texts": 64, "similarity": "token"})


def settings() -> Iterator[dict[str, Any]]:
    """Pairs, and all at once; then what else there is to choose, for pairs."""
    for drop in DROPS:
        for combine in dict.fromkeys((2, drop + 1)):
            for rule, norms in RULES:
                yield {"drop": drop, "combine": combine, "rule": rule, "norms": norms}
        for other in OTHERS:
            yield {"drop": drop, "combine": 2, "rule": "telescope", "norms": "base", **other}


class Evaluated:
    """Perplexity of a folder, once for equal weights."""

    def __init__(self) -> None:
        self._tokens = tokenize(HELDOUT.read_text(encoding="utf-8"), load_tokenizer(MODEL))
        self._known: dict[str, float] = {}

    def __call__(self, folder: Path) -> float:
        key = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if key not in self._known:
            model = liar_ext.load(folder, dtype=torch.float32)
            self._known[key] = perplexity(model, self._tokens, SEQ_LEN, 8).perplexity
        return self._known[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--note", help="what else ran")
    arguments = parser.parse_args()
    evaluated, rows = Evaluated(), []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        result: dict[str, Any] = {"note": arguments.note, "environment": environment()}
        result |= {"dense": evaluated(MODEL), "rows": rows}
        print("dense", result["dense"], flush=True)
        alone = [[layer] for layer in range(LAYERS - 1)]
        for gone in (*alone, *(list(range(LAYERS - count, LAYERS)) for count in DROPS)):
            drop_layers(MODEL, out, gone, overwrite=True)
            rows.append({"left_out": gone, "perplexity": evaluated(out)})
            print(rows[-1], flush=True)
        for fields in settings():
            chosen = MergeSettings(highest=LAYERS, calibration=str(CALIBRATION), **fields)
            report = merge_layers(MODEL, out, chosen, overwrite=True)
            rows.append(
                {
                    **fields,
                    "perplexity": evaluated(out),
                    "layers": report["layers"],
                    "accepted": report["merge"]["accepted"],
                    "threshold": report["merge"]["threshold"],
                    "layer_evaluations": report["merge"]["layer_evaluations"],
                    "seconds": report["seconds_by"],
                }
            )
            steps = [(step["layer"], step["with"]) for step in rows[-1]["accepted"]]
            print(fields, rows[-1]["perplexity"], steps, rows[-1]["seconds"], flush=True)
            arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
