"""The shipped demo model is what its log says, and its script still makes one."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "src" / "liar_ext" / "demo"
MODEL = DEMO / "model"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    name = "train_demo_model_under_test"
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "train_demo_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


@pytest.fixture(scope="module")
def corpus(script: ModuleType):
    return script.build_corpus()


@pytest.fixture(scope="module")
def log() -> dict:
    return json.loads((MODEL / "training_log.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    """Puts back the global settings that the script makes for a process of its own."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def read(name: str) -> str:
    return (DEMO / name).read_text(encoding="utf-8")


def long_lines(script: ModuleType, text: str) -> list[str]:
    return [key for line in text.splitlines() if len(key := script.normalise(line)) >= 40]


def test_loads_with_stock_classes_in_bfloat16_and_no_warning(caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert "not initialized" not in capfd.readouterr().err


def test_stored_tensors_are_bfloat16_and_the_embedding_is_stored_once():
    with safe_open(MODEL / "model.safetensors", "pt") as tensors:
        names = list(tensors.keys())
        dtypes = {tensors.get_slice(name).get_dtype() for name in names}
    assert "lm_head.weight" not in names
    assert dtypes == {"BF16"}


def test_shape_leaves_room_to_prune():
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    assert 4 <= config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["intermediate_size"] % 64 == 0


def test_sizes_stay_within_the_package_limits():
    assert 2 * MEGABYTE <= (MODEL / "model.safetensors").stat().st_size <= 6 * MEGABYTE
    assert 200_000 <= (DEMO / "heldout.txt").stat().st_size <= 400_000
    assert 500_000 <= (DEMO / "calibration.txt").stat().st_size <= 700_000
    data = [*MODEL.iterdir(), DEMO / "heldout.txt", DEMO / "calibration.txt"]
    assert sum(path.stat().st_size for path in data) < 8 * MEGABYTE


def test_heldout_perplexity_is_the_logged_one(script, tokenizer, log):
    ids = script.token_ids(tokenizer, read("heldout.txt"))
    assert len(ids) == log["corpus"]["heldout"]["tokens"]
    windows = script.evaluation_windows(ids, log["architecture"]["context"])
    assert len(windows) == log["result"]["heldout_windows"]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    loss = script.heldout_loss(model, windows[: log["result"]["quick_windows"]])
    assert math.exp(loss) == pytest.approx(log["result"]["quick_perplexity_bf16_weights"], rel=0.02)


def test_rounding_the_weights_to_bfloat16_costs_under_one_percent(log):
    result = log["result"]
    ratio = result["heldout_perplexity_bf16_weights"] / result["heldout_perplexity_fp32"]
    assert ratio == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "text",
    [
        "Return a new list",
        "  def f(x, *, y=None):\n\treturn  x ** 2  # spaces kept\n\n",
        "naïve — π ≈ 3.14159, 漢字, 🐍\r\n\0",
        " .' ,n't can't",
        "",
    ],
    ids=["prose", "code", "beyond-ascii", "no-clean-up", "empty"],
)
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_wrapper_and_training_tokenize_alike(script, tokenizer):
    text = read("heldout.txt")[:5000]
    assert tokenizer(text, verbose=False)["input_ids"] == script.token_ids(tokenizer, text).tolist()
    assert tokenizer.eos_token_id in script.token_ids(tokenizer, text)


def test_texts_are_the_logged_ones(script, log):
    for name in ("heldout", "calibration"):
        text = read(f"{name}.txt")
        assert script.hashlib.sha256(text.encode()).hexdigest() == log["corpus"][name]["sha256"]
        assert text.endswith(script.SEPARATOR)
        assert text.count(script.SEPARATOR) == log["corpus"][name]["documents"]


def test_heldout_and_calibration_share_no_document_and_no_long_line(script):
    heldout, calibration = read("heldout.txt"), read("calibration.txt")
    documents = [set(text.split(script.SEPARATOR)) - {""} for text in (heldout, calibration)]
    assert documents[0].isdisjoint(documents[1])
    # lines of 40 characters or more are cleared by the split itself, so no boilerplate is excused
    shared = set(long_lines(script, heldout)) & set(long_lines(script, calibration))
    assert not shared


def test_greedy_continuation_reads_as_text(script):
    sample = script.greedy_sample(MODEL)
    assert sample.startswith(script.PROMPT)
    words = [word.strip(".,:;()'\"").lower() for word in sample.split()]
    assert len(set(words)) >= 15
    assert sum(word in {"the", "a", "of", "is", "to", "and", "in"} for word in words) >= 4
    assert script.PROMPT in (MODEL / "README.md").read_text(encoding="utf-8")


def test_split_is_deterministic_and_does_not_depend_on_document_order(script, corpus):
    documents = [*corpus.train, *corpus.heldout]
    first = script.split_documents(documents, script.Split())
    again = script.split_documents(reversed(documents), script.Split())
    assert first.heldout == again.heldout
    assert first.train == again.train == corpus.train


def test_split_is_disjoint_by_document_line_and_word_run(script, corpus):
    assert {d.name for d in corpus.train}.isdisjoint({d.name for d in corpus.heldout})
    assert set(corpus.calibration) <= set(corpus.train)
    known = set().union(*(script.fingerprints(p) for d in corpus.train for p in d.paragraphs))
    for document in corpus.heldout:
        for paragraph in document.paragraphs:
            assert known.isdisjoint(script.fingerprints(paragraph)), document.name
    shared = set(long_lines(script, script.joined(corpus.train))) & set(
        long_lines(script, script.joined(corpus.heldout))
    )
    assert not shared


def test_near_copy_of_a_training_paragraph_leaves_the_heldout_text(script):
    words = [f"word{i}" for i in range(13)]
    names = [f"module:{i}.py" for i in range(200)]
    held = next(name for name in names if script.unit_hash(name) < script.Split().heldout_share)
    trained = next(name for name in names if script.unit_hash(name) >= script.Split().heldout_share)
    rewrapped = "New: " + "\n".join(words)
    corpus = script.split_documents(
        [
            script.Document(trained, (" ".join(words),)),
            script.Document(held, (rewrapped, "Only here.")),
        ],
        script.Split(),
    )
    assert [d.paragraphs for d in corpus.heldout] == [("Only here.",)]


def test_committed_texts_are_reproduced_by_the_logged_interpreter(script, corpus, log):
    if log["versions"]["python"] != script.platform.python_version():
        pytest.skip(f"the text was made with python {log['versions']['python']}")
    assert script.joined(corpus.heldout) == read("heldout.txt")
    assert script.joined(corpus.calibration) == read("calibration.txt")


def test_two_training_steps_write_a_loadable_model(script, tmp_path, monkeypatch, torch_settings):
    # the topics alone are a corpus of the same kind and a sixth of the size
    monkeypatch.setattr(script, "module_documents", lambda stdlib: iter(()))
    script.main(["--steps", "2", "--batch", "2", "--eval-every", "1", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "model" / "training_log.json").read_text())
    assert [point["step"] for point in made["curve"]] == [1, 2]
    assert {path.name for path in MODEL.iterdir()} <= {
        p.name for p in (tmp_path / "model").iterdir()
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.num_parameters() == made["result"]["parameters"]


def test_text_only_writes_no_model(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "module_documents", lambda stdlib: iter(()))
    script.main(["--text-only", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"heldout.txt", "calibration.txt"}


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ("Architecture", {"kv_heads": 2}, "kv_heads=2"),
        ("Architecture", {"ffn_size": 500}, "ffn_size=500"),
        ("Training", {"steps": 0}, "steps=0"),
        ("Training", {"dropout": 1.0}, "dropout=1.0"),
        ("Split", {"heldout_share": 1.5}, "heldout_share=1.5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_configuration_names_the_value(script, config, fields, message):
    with pytest.raises(ValueError, match=message):
        getattr(script, config)(**fields)
