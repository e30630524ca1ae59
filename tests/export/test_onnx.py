"""ONNX graphs: what ONNX Runtime computes is the model, token by token too."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liar_export import shrunk
from liar_families import FAMILIES, outputs, probe_tokens, tree_hash
from torch import Tensor

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.export import onnx
from liar_ext.export.onnx import NAME, export_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime, of liar-ext[onnx]")
pytest.importorskip("onnxscript", reason="needs onnxscript, of liar-ext[onnx]")

PER_LAYER = [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}]
# float32 products whose sums are in another order
TOLERANCE = 1e-5


def _small(name: str, folder: Path, widths: Any = PER_LAYER) -> Path:
    return shrunk(FAMILIES[name].build(), folder, widths)


def _session(folder: Path) -> Any:
    return onnxruntime.InferenceSession(str(folder / NAME), providers=["CPUExecutionProvider"])


def _close(found: np.ndarray, expected: Tensor) -> None:
    assert float(expected.std()) > 1e-3, "outputs that do not vary show nothing"
    worst = float(np.abs(found - expected.numpy()).max())
    assert worst <= TOLERANCE * float(expected.abs().max())


def greedy(session: Any, ids: Tensor, steps: int) -> list[list[int]]:
    """What a user writes: the cache goes round, one token at a time."""
    inputs = {i.name: i for i in session.get_inputs()}
    outs = [o.name for o in session.get_outputs()]
    batch = len(ids)
    past = {
        name: np.zeros((batch, entry.shape[1], 0, entry.shape[3]), np.float32)
        for name, entry in inputs.items()
        if name.startswith("past_key_values")
    }
    made, new, seen = ids.tolist(), ids.numpy(), 0
    for _ in range(steps):
        seen += new.shape[1]
        feed = {"input_ids": new, "attention_mask": np.ones((batch, seen), np.int64)}
        if "position_ids" in inputs:
            places = np.arange(seen - new.shape[1], seen)
            feed["position_ids"] = np.tile(places, (batch, 1))
        found = dict(zip(outs, session.run(outs, feed | past), strict=True))
        new = found["logits"][:, -1].argmax(-1, keepdims=True)
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
        for row, token in zip(made, new[:, 0].tolist(), strict=True):
            row.append(token)
    return made


@pytest.mark.parametrize(
    "name",
    [
        "llama-tied",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            # of sliding windows of 8, generation leaves the window
            for name in ("gpt2", "opt", "mistral-sliding", "qwen2-mixed", "qwen3-mixed")
        ),
    ],
)
def test_generates_what_transformers_generates_from_per_layer_widths(name: str, tmp_path: Path):
    small = _small(name, tmp_path / "small")
    before = tree_hash(small)
    report = export_onnx(small, tmp_path / "onnx")
    assert tree_hash(small) == before, "the source was modified"
    model, session = liar_ext.load(small), _session(tmp_path / "onnx")
    ids = probe_tokens(3, 5)
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
    assert greedy(session, ids, 14) == model.generate(ids, **options).tolist()
    assert report["export"]["past"]
    # more heads in the second layer
    heads = [i.shape[1] for i in session.get_inputs() if i.name.endswith(".key")]
    assert heads == sorted(heads)
    assert len(set(heads)) == 2
    assert report["export"]["compared"]["max_abs"] <= TOLERANCE * 10
    assert {p.name for p in (tmp_path / "onnx").iterdir()} >= {"README.md", "liar_report.json"}
    assert not list((tmp_path / "onnx").glob("*.safetensors"))


@pytest.mark.parametrize("name", ["bert", *(pytest.param("qwen2", marks=pytest.mark.slow),)])
def test_whole_sequences_of_any_batch_and_length_with_padding(name: str, tmp_path: Path):
    small = _small(name, tmp_path / "small")
    export_onnx(small, tmp_path / "onnx", past=False)
    model, session = liar_ext.load(small), _session(tmp_path / "onnx")
    for batch, length in ((1, 1), (2, 9), (5, 24)):
        ids, mask = probe_tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
        mask[0, (length + 1) // 2 :] = 0
        extra = {"token_type_ids": torch.zeros_like(ids)} if name == "bert" else {}
        expected = outputs(model, ids, attention_mask=mask, **extra)
        feed = {"input_ids": ids, "attention_mask": mask, **extra}
        feed = {i.name: feed[i.name].numpy() for i in session.get_inputs()}
        (found, *_) = session.run(None, feed)
        assert found.shape == expected.shape
        _close(found[mask.bool().numpy()], expected[mask.bool()])


@pytest.mark.slow
def test_a_layer_without_attention_has_no_cache(tmp_path: Path):
    small = _small(
        "llama-tied", tmp_path / "small", [{"heads": 0, "ffn": 20}, {"heads": 2, "ffn": 0}]
    )
    report = export_onnx(small, tmp_path / "onnx")
    assert [n for n in report["export"]["inputs"] if n.startswith("past")] == [
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    ids = probe_tokens(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    wanted = liar_ext.load(small).generate(ids, **options).tolist()
    assert greedy(_session(tmp_path / "onnx"), ids, 8) == wanted


def test_a_graph_that_is_not_the_model_is_not_written(tmp_path: Path, monkeypatch: Any):
    small = _small("bert", tmp_path / "small")

    def wrong(graph: Any, folder: Path) -> Any:
        class Program:
            def save(self, path: str, external_data: bool) -> None:
                Path(path).write_bytes(b"")

        return Program()

    monkeypatch.setattr(onnx, "_traced", wrong)
    off = {"tokens": 9, "max_abs": 0.5, "rms_relative": 0.1, "largest": 3.0}
    monkeypatch.setattr(onnx, "compare", lambda *_: off)
    with pytest.raises(InputError, match="the graph is not the model: outputs up to 3 are off"):
        export_onnx(small, tmp_path / "onnx")
    monkeypatch.setattr(onnx, "compare", lambda *_: off | {"max_abs": float("nan")})
    with pytest.raises(InputError, match="the graph is not the model"):
        export_onnx(small, tmp_path / "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: Any, capsys: Any):
    small = _small("bert", tmp_path / "small")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else real(n, *a)
    )
    assert main(["export", str(small), "--out", str(tmp_path / "o"), "--format", "onnx"]) == 2
    assert "onnxscript not installed; pip install 'liar-ext[onnx]'" in capsys.readouterr().err


def test_the_report_says_what_the_differences_are(tmp_path: Path):
    wide = np.full((2, 3), 4.0, np.float32)
    found = onnx._difference([wide + 0.5, wide], [wide, wide], 12)
    assert found == {
        "tokens": 12,
        "max_abs": 0.5,
        "rms_relative": pytest.approx(0.5 / 4 / 2**0.5),
        "largest": 4.0,
    }
    assert json.dumps(found)
