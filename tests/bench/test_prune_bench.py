"""`liar bench prune` on a model of `benchmarks/random_llama.py`: end to end, offline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from liar_ext.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_a_random_llama_is_made_and_compressed(streamed, tmp_path, capsys):
    script = ROOT / "benchmarks" / "random_llama.py"
    sizes = ["--hidden", "32", "--ffn", "48", "--layers", "1", "--vocabulary", "64"]
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path), *sizes, "--tokens", "2000"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    model = Path(done.stdout.strip())
    assert model == tmp_path / "model"
    file = tmp_path / "result.json"
    words = ["--calibration", str(tmp_path / "tokens.npy"), "--target", "ffn", "--repeats", "1"]
    words += ["--sparsity", "0.5", "--samples", "8", "--seq-len", "16", "--name", "small"]
    words += ["--device", "cpu", *(["--streamed"] if streamed else [])]
    assert main(["bench", "prune", str(model), *words, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["source"] == "small"
    assert result["device"] == "cpu"
    assert result["tokens"] == 128
    assert result["ratio"]["median"] > 0
    assert result["peak_bytes"] is None
    assert result["streamed"] == streamed
    assert result["layers"] == 1
    assert ("hidden_states" in result["run"]) == streamed
    assert result["run"]["backends"]["gram"] in ("cpu", "torch")
    assert "ratio" in capsys.readouterr().out
