"""llama.cpp itself, on what its converter and `deci` make of pruned models. `make engines` installs
it and runs these; they need the package llama-cpp-python and LIAR_LLAMA_CPP, a folder with
convert_hf_to_gguf.py."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from liar_export import shrunk
from liar_families import randomise
from transformers import AutoTokenizer, PreTrainedModel

import liar_ext
from liar_ext.export.converter import convert, find_converter
from liar_ext.export.deci import export_deci
from liar_ext.export.gguf import GgufOptions, export_gguf
from liar_ext.export.widths import Widths

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: make engines")
CONVERTER = os.environ.get("LIAR_LLAMA_CPP")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CONVERTER is None, reason="needs LIAR_LLAMA_CPP, a folder: make engines"),
]
DEMO = Path(liar_ext.__file__).parent / "demo"
VOCABULARY = 4096
# float32 products whose sums are in another order, and exponentials of another library
TOLERANCE = 2e-5
PER_LAYER = [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}, {"heads": 2, "ffn": 48}]
UNIFORM = [{"heads": 2, "ffn": 20}] * 3
THREE = [{"heads": 3, "ffn": 20}] * 3
LAYERS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
CONFIGS = {
    "llama": transformers.LlamaConfig(**LAYERS),
    "llama-tied": transformers.LlamaConfig(**LAYERS, tie_word_embeddings=True),
    "llama3-rope": transformers.LlamaConfig(**LAYERS, rope_parameters=LLAMA3),
    "linear-rope": transformers.LlamaConfig(**LAYERS, rope_parameters=LINEAR),
    "mistral": transformers.MistralConfig(**LAYERS, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**LAYERS),
    "qwen3": transformers.Qwen3Config(**LAYERS),
}


def _folder(name: str, folder: Path, widths: Any, biases: tuple[str, ...] = ()) -> Path:
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    model.config.architectures = [type(model).__name__]
    small = shrunk(randomise(model), folder, widths, biases)
    for path in (DEMO / "model").glob("tokenizer*"):
        shutil.copy(path, small)
    return small


class Engine:
    """llama.cpp with a model, keys and values in float32."""

    def __init__(self, file: Path) -> None:
        f32 = 0
        self._llama = llama_cpp.Llama(
            str(file),
            n_ctx=128,
            n_batch=128,
            n_threads=1,
            verbose=False,
            logits_all=True,
            type_k=f32,
            type_v=f32,
        )

    def logits(self, ids: list[int]) -> np.ndarray:
        self._llama.reset()
        self._llama.eval(ids)
        return np.array(self._llama.scores[: len(ids)])

    def greedy(self, ids: list[int], steps: int) -> list[int]:
        self._llama.reset()
        made = self._llama.generate(ids, temp=0.0, repeat_penalty=1.0)
        return [token for token, _ in zip(made, range(steps), strict=False)]

    def tokens(self, text: str) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=False, special=False)

    def close(self) -> None:
        self._llama.close()


def _text() -> str:
    return (DEMO / "heldout.txt").read_text()[:300]


def _logits(engine: Engine, model: PreTrainedModel, ids: list[int]) -> tuple[Any, Any]:
    with torch.no_grad():
        expected = model.float()(torch.tensor([ids])).logits[0].numpy()
    assert float(expected.std()) > 1e-2, "outputs that do not vary show nothing"
    return engine.logits(ids), expected


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[Any]:
    """folder -> llama.cpp with what `liar export` makes of it, and the report."""
    engines = []

    def made(small: Path, outtype: str = "f32") -> tuple[Engine, dict[str, Any]]:
        options = GgufOptions(CONVERTER, outtype, "gpt-2")
        report = export_gguf(small, tmp_path / f"gguf-{outtype}", options)
        file = tmp_path / f"gguf-{outtype}" / report["export"]["file"]
        engines.append(Engine(file))
        return engines[-1], report

    yield made
    for engine in engines:
        engine.close()


CASES = [
    ("llama", UNIFORM, ()),
    ("llama", UNIFORM, ("heads", "ffn")),
    # 6 query heads, which LlamaConfig does not accept at 64: written as mistral
    ("llama", THREE, ()),
    ("mistral", UNIFORM, ()),
    ("qwen2", UNIFORM, ()),
    ("qwen3", UNIFORM, ()),
    ("llama", PER_LAYER, ()),
    ("llama-tied", PER_LAYER, ("heads", "ffn")),
    ("llama3-rope", PER_LAYER, ()),
    ("linear-rope", PER_LAYER, ()),
    ("mistral", PER_LAYER, ("heads", "ffn")),
    ("qwen2", PER_LAYER, ("ffn",)),
    ("llama", [{"heads": 0, "ffn": 20}, {"heads": 3, "ffn": 0}, {"heads": 2, "ffn": 48}], ()),
    (
        "llama-tied",
        [{"heads": 2, "ffn": 0}, {"heads": 0, "ffn": 33}, {"heads": 0, "ffn": 0}],
        ("heads", "ffn"),
    ),
]


@pytest.mark.parametrize(("name", "widths", "biases"), CASES)
def test_computes_the_logits_of_transformers(
    name: str, widths: Any, biases: tuple[str, ...], tmp_path: Path, exported: Any
):
    small = _folder(name, tmp_path / "small", widths, biases)
    engine, report = exported(small)
    per_layer = len({tuple(layer.values()) for layer in widths}) > 1
    # llama.cpp's own architecture for Qwen2 has no room for fewer heads
    assert (report["export"]["architecture"] == "deci") == (per_layer or name == "qwen2")
    model, tokenizer = liar_ext.load(small), AutoTokenizer.from_pretrained(DEMO / "model")
    ids = tokenizer(_text()).input_ids[:60]
    assert engine.tokens(_text())[:60] == ids
    found, expected = _logits(engine, model, ids)
    assert float(np.abs(found - expected).max()) <= TOLERANCE * float(np.abs(expected).max())
    made = model.generate(torch.tensor([ids[:20]]), max_new_tokens=20, do_sample=False)
    assert engine.greedy(ids[:20], made.shape[1] - 20) == made[0, 20:].tolist()


def test_llama_cpps_own_converter_reads_block_configs(tmp_path: Path):
    """`--format deci`; its converter takes BPE tokenizers for vocabularies of this size alone, and
    hidden size / heads for the size of a head."""
    CONFIGS["large"] = transformers.LlamaConfig(
        **{**LAYERS, "vocab_size": 128256, "intermediate_size": 600}
    )
    widths = [{"heads": 2, "ffn": 200}, {"heads": 4, "ffn": 600}, {"heads": 3, "ffn": 300}]
    small = _folder("large", tmp_path / "small", widths)
    export_deci(small, tmp_path / "deci", Widths(to="dense"))
    file = tmp_path / "deci.gguf"
    convert(find_converter(CONVERTER), tmp_path / "deci", file, ["--outtype", "f32"], "gpt-2")
    engine = Engine(file)
    found, expected = _logits(engine, liar_ext.load(small), engine.tokens(_text())[:60])
    engine.close()
    assert float(np.abs(found - expected).max()) <= TOLERANCE * float(np.abs(expected).max())


@pytest.mark.parametrize(("outtype", "digits"), [("f16", 11), ("bf16", 8)])
def test_half_precision_is_off_by_its_rounding(
    outtype: str, digits: int, tmp_path: Path, exported: Any
):
    small = _folder("llama", tmp_path / "small", PER_LAYER)
    engine, _ = exported(small, outtype)
    ids = engine.tokens(_text())[:60]
    # matrices and what they are multiplied with are rounded, to half a unit of the last place at
    # most, in 3 layers of 7 matrices and the head; independent errors add up as squares do. A
    # softmax magnifies what is off in q and k where scores are large, as random ones are: hence 2
    found, expected = _logits(engine, liar_ext.load(small), ids)
    off = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert 1e-5 < off <= 2 * (2 * 22) ** 0.5 * 2.0**-digits


def test_a_tokenizer_that_is_in_no_list_is_named_with_the_way_out(tmp_path: Path):
    small = _folder("llama", tmp_path / "small", PER_LAYER)
    with pytest.raises(liar_ext.InputError, match="of GPT-2's: --pre-tokenizer gpt-2"):
        export_gguf(small, tmp_path / "out", GgufOptions(CONVERTER))
    assert not (tmp_path / "out").exists()
