"""GGUF files, without llama.cpp: which converter runs, and what is in a file of per-layer widths.

`test_llama_cpp.py` has llama.cpp itself load such files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from liar_export import shrunk
from liar_families import FAMILIES, tree_hash
from safetensors.torch import load_file

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.export.converter import find_converter, is_gpt2
from liar_ext.export.gguf import GgufOptions, export_gguf
from liar_ext.export.gguf_layers import interleaved

gguf = pytest.importorskip("gguf", reason="needs gguf, of liar-ext[gguf]")
PER_LAYER = [{"heads": 1, "ffn": 20}, {"heads": 3, "ffn": 33}]
ABSENT = [{"heads": 2, "ffn": 0}, {"heads": 0, "ffn": 20}]
# stands for llama.cpp's: the arguments that it is called with, and the fields of a vocabulary
CONVERTER = """
import json, sys
import gguf

class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized")

def main():
    folder, out = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
    config = json.load(open(folder + "/config.json"))
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_name(sys.argv[-1])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(TextModel().get_vocab_base_pre(None))
    writer.add_token_list([str(i) for i in range(config["vocab_size"])])
    writer.add_string("test.arguments", json.dumps(sys.argv[1:]))
    writer.add_string("test.model_type", config["model_type"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
"""


@pytest.fixture
def converter(tmp_path: Path) -> str:
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return str(folder)


def _small(name: str, folder: Path, widths: Any, biases: tuple[str, ...] = ()) -> Path:
    return shrunk(FAMILIES[name].build(), folder, widths, biases)


def _fields(file: Path) -> dict[str, Any]:
    return {name: entry.contents() for name, entry in gguf.GGUFReader(str(file)).fields.items()}


def test_a_stock_folder_goes_through_the_converter(tmp_path: Path, converter: str):
    small = _small("llama-mha", tmp_path / "small", [PER_LAYER[0]] * 2)
    report = export_gguf(small, tmp_path / "out", GgufOptions(converter, "f32", "some-bpe"))
    fields = _fields(tmp_path / "out" / "model-f32.gguf")
    assert fields["tokenizer.ggml.pre"] == "some-bpe"
    arguments = json.loads(fields["test.arguments"])
    assert arguments[0] == str(small)
    assert arguments[-2:] == ["--outtype", "f32"]
    assert report["export"]["architecture"] == "the converter's"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("model-f32.gguf", "liar_report.json", "README.md"),
    }


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_per_layer_widths_are_lists_and_tensors_in_llama_cpps_order(
    outtype: str, tmp_path: Path, converter: str
):
    small = _small("llama-gqa-biases", tmp_path / "small", PER_LAYER)
    before = tree_hash(small)
    report = export_gguf(small, tmp_path / "out", GgufOptions(converter, outtype, "gpt-2"))
    assert tree_hash(small) == before, "the source was modified"
    file = tmp_path / "out" / report["export"]["file"]
    fields = _fields(file)
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [2, 6]
    assert fields["deci.attention.head_count_kv"] == [1, 3]
    assert fields["deci.feed_forward_length"] == [20, 33]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == 4
    assert fields["deci.attention.layer_norm_rms_epsilon"] > 0
    assert fields["general.name"] == "small"
    assert fields["test.model_type"] == "llama"
    assert not [name for name in fields if name.startswith("llama.")]
    stored = load_file(small / "model.safetensors")
    found = {t.name: t for t in gguf.GGUFReader(str(file)).tensors}
    assert len(found) == len(stored)
    names = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
    assert found["blk.1.ffn_up.weight"].tensor_type.name == names[outtype]
    assert found["blk.1.ffn_up.bias"].tensor_type.name == "F32"
    # rounding to 11 or 8 digits
    digits = {"f32": 24, "f16": 11, "bf16": 8}[outtype]
    for name, tensor in (
        ("blk.1.ffn_down.weight", stored["model.layers.1.mlp.down_proj.weight"]),
        ("blk.1.attn_output.bias", stored["model.layers.1.self_attn.o_proj.bias"]),
        ("token_embd.weight", stored["model.embed_tokens.weight"]),
        ("blk.1.attn_v.weight", stored["model.layers.1.self_attn.v_proj.weight"]),
    ):
        values = gguf.dequantize(found[name].data, found[name].tensor_type)
        wanted = tensor.numpy()
        assert values.shape == wanted.shape
        assert float(np.abs(values - wanted).max()) <= 2.0**-digits * float(np.abs(wanted).max())
    query = gguf.dequantize(
        found["blk.1.attn_q.weight"].data, found["blk.1.attn_q.weight"].tensor_type
    )
    wanted = stored["model.layers.1.self_attn.q_proj.weight"].numpy()
    # of each head of 4 rows: 0, 2, 1, 3
    order = [4 * head + row for head in range(6) for row in (0, 2, 1, 3)]
    assert float(np.abs(query - wanted[order]).max()) <= 2.0**-digits * float(np.abs(wanted).max())


def test_absent_blocks_are_small_blocks_of_zeros(tmp_path: Path, converter: str):
    small = _small("llama-gqa-biases", tmp_path / "small", ABSENT)
    export_gguf(small, tmp_path / "out", GgufOptions(converter, "f32", "gpt-2"))
    file = tmp_path / "out" / "model-f32.gguf"
    fields = _fields(file)
    assert fields["deci.attention.head_count_kv"] == [2, 1]
    assert fields["deci.feed_forward_length"] == [32, 20]
    found = {t.name: t.data for t in gguf.GGUFReader(str(file)).tensors}
    assert not found["blk.0.ffn_down.weight"].any()
    assert not found["blk.1.attn_q.weight"].any()
    assert found["blk.1.attn_output.bias"].any(), "the bias of an absent block stays"
    assert bool((found["blk.0.ffn_norm.weight"] == 1).all())


def test_halves_of_each_head_are_interleaved():
    rows = torch.arange(12.0).reshape(12, 1)
    assert interleaved(rows, 6).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleaved(rows.flatten(), 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3", "it is a qwen3, and deci is LLaMA"),
        ("gpt2", "it is a gpt2"),
        ("mistral-sliding", "sliding window of 8"),
        ("qwen2-mixed", "sliding window"),
    ],
)
def test_another_function_is_refused_with_the_way_out(
    name: str, reason: str, tmp_path: Path, converter: str
):
    small = _small(name, tmp_path / "small", PER_LAYER)
    with pytest.raises(InputError, match=f"{reason}.*--format padded first"):
        export_gguf(small, tmp_path / "out", GgufOptions(converter))
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, converter: str):
    model = FAMILIES["llama-mha"].build()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 1e6
    small = shrunk(model, tmp_path / "small", PER_LAYER)
    with pytest.raises(InputError, match=r"up_proj.weight: weights up to 1.0e\+06 do not fit"):
        export_gguf(small, tmp_path / "out", GgufOptions(converter, "f16", "gpt-2"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    export_gguf(small, tmp_path / "out", GgufOptions(converter, "bf16", "gpt-2"))


def test_what_the_converter_says_is_one_line(tmp_path: Path, converter: str, capsys: Any):
    small = _small("llama-mha", tmp_path / "small", [PER_LAYER[0]] * 2)
    command = ["export", str(small), "--out", str(tmp_path / "out"), "--format", "gguf"]
    assert main([*command, "--converter", converter]) == 2
    assert "say which of llama.cpp's it is" in capsys.readouterr().err
    split = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    (small / "tokenizer.json").write_text(json.dumps({"normalizer": None, "pre_tokenizer": split}))
    assert main([*command, "--converter", converter]) == 2
    assert "tokenizer.json is of GPT-2's: --pre-tokenizer gpt-2" in capsys.readouterr().err
    script = Path(converter) / "convert_hf_to_gguf.py"
    script.write_text("import sentencepieces_that_is_not_there")
    assert main([*command, "--converter", converter]) == 2
    assert "needs a package that is not installed here" in capsys.readouterr().err
    script.write_text("def main():\n    raise ValueError('what a model')")
    assert main([*command, "--converter", str(script)]) == 2
    assert "failed (ValueError: what a model)" in capsys.readouterr().err
    assert main([*command, "--converter", str(tmp_path / "no")]) == 2
    assert "--converter" in capsys.readouterr().err
    assert main([*command, "--converter", converter, "--outtype", "q4_k"]) == 2
    assert "--outtype q4_k: must be one of f32, f16, bf16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_converter_on_path_is_found(tmp_path: Path, converter: str, monkeypatch: Any):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no convert_hf_to_gguf.py on PATH; give --converter"):
        find_converter(None)
    (Path(converter) / "convert_hf_to_gguf.py").chmod(0o755)
    monkeypatch.setenv("PATH", converter)
    assert find_converter(None) == find_converter(converter)


def test_the_demo_tokenizer_splits_as_gpt2s():
    assert is_gpt2(Path(liar_ext.__file__).parent / "demo" / "model")
    assert not is_gpt2(Path(sys.prefix))
