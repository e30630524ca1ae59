"""`liar bench serve`: that what is timed is what transformers computes, and what the file says."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from liar_families import FAMILIES, UNLISTED

from liar_ext import Recipe, compress
from liar_ext.bench import measure, serve, serve_lanes, serve_probe, serve_rounds
from liar_ext.bench.serve_entries import whole
from liar_ext.bench.serve_lanes import Decoding, compiling, lane, reference, settled
from liar_ext.bench.serve_models import outline, sources
from liar_ext.bench.serve_prompts import Work, drawn, workloads
from liar_ext.bench.serve_work import Ceilings, sizes, why, work_of
from liar_ext.checkpoint.reader import parameter_count
from liar_ext.cli import main
from liar_ext.demo import CALIBRATION, MODEL
from liar_ext.models import layout

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "benchmarks" / "shapes"
CPU = torch.device("cpu")
EVERY = {**FAMILIES, **UNLISTED}
PEAKS = [50_000_000, 60_000_000, 70_000_000, 80_000_000]
PROBED = {
    "import_s": 1.0,
    "load_s": 0.5,
    "load_warm_s": 0.25,
    "page_cache": "emptied",
    "base_bytes": 40_000_000,
    "peaks": PEAKS,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """Small ceilings, no warm-up, and no processes but where a test asks for one."""
    monkeypatch.setattr(serve_rounds, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(measure, "CEILING_SIDE", {"cpu": 64})
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 2**16})
    if "own_process" not in request.fixturenames:
        monkeypatch.setattr(serve_probe, "measured", lambda *words, **more: copy.deepcopy(PROBED))


@pytest.fixture
def own_process():
    """The test starts processes."""


def run(tmp_path, *words: str) -> dict:
    file = tmp_path / "serve.json"
    short = ["--device", "cpu", "--new-tokens", "4", "--repeats", "2", "--json", str(file)]
    assert main(["bench", "serve", *short, *words]) == 0
    return json.loads(file.read_text())


def ids_for(batch: int = 2, length: int = 9) -> torch.Tensor:
    return drawn(batch, length, 90, CPU)


# -- what is timed is what transformers computes -------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_every_family_gives_what_transformers_gives(name):
    model = EVERY[name].build()
    kind = "decoder" if EVERY[name].decoder else "encoder"
    assert model.can_generate() == EVERY[name].decoder
    own = lane(model, kind, ids_for(), 6, "eager")
    found = own.check()
    assert found["ok"], found
    assert set(own.round()) == ({"prefill", "decode"} if kind == "decoder" else {"prefill"})


@torch.no_grad()
def test_the_reference_is_the_argmax_of_whole_forwards():
    """Independent of caches: each token from all tokens before it, computed anew."""
    model, ids = FAMILIES["llama-gqa-biases"].build(), ids_for()
    expected, _ = reference(model, ids, 5)
    every = ids
    for _ in range(5):
        every = torch.cat([every, model(every).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(every[:, ids.shape[1] :], expected)


@torch.no_grad()
def test_an_end_of_text_and_penalties_of_the_folder_do_not_count():
    model, ids = FAMILIES["llama-mha"].build(), ids_for()
    expected, _ = reference(model, ids, 6)
    model.generation_config.eos_token_id = int(expected[0, 1])
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    own = model.generation_config
    assert torch.equal(reference(model, ids, 6)[0], expected)
    assert model.generation_config is own
    assert Decoding(model, ids, 6, "eager").check()["ok"]


@torch.no_grad()
def test_a_loop_that_says_something_else_is_not_timed(tmp_path, monkeypatch, capsys):
    """Of two models the second one's decoding is broken: it is named, and the first has figures."""
    right = Decoding.decode

    def decode(self, token, cache):
        found = right(self, token, cache)
        return found if self._model.config.intermediate_size == 512 else (found + 1) % 7

    monkeypatch.setattr(Decoding, "decode", decode)
    file = tmp_path / "serve.json"
    words = [str(MODEL), f"{MODEL}@0.5", "--batch", "1", "--prompt", "8", "--repeats", "2"]
    assert main(["bench", "serve", *words, "--device", "cpu", "--json", str(file)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: model@0.5 (eager, batch 1, prompt 8): is not what transformers")
    dense, pruned = json.loads(file.read_text())["entries"]
    assert dense["decode_s"]["p50"] > 0
    assert pruned["decode_s"] is pruned["speedup"] is None
    assert pruned["check"]["same"] < pruned["check"]["tokens"]


@torch.no_grad()
def test_of_tokens_that_are_as_good_either_will_do(monkeypatch):
    """A decoding that takes the second best: within rounding it may, and no further."""
    model, ids = FAMILIES["llama-mha"].build(), ids_for()
    own = Decoding(model, ids, 6, "eager")

    def second(output):
        return output.logits[:, -1].float().topk(2).indices[:, 1:]

    monkeypatch.setattr(serve_lanes, "_next", second)
    found = own.check()
    assert (found["same"], found["ok"]) == (0, False)
    _, logits = reference(model, ids, 6)
    best = logits.topk(2).values
    assert found["gap"] == pytest.approx(float((best[..., 0] - best[..., 1]).max()), rel=1e-3)
    monkeypatch.setattr(serve_lanes, "rounding", lambda model: 1.0)
    assert own.check()["ok"]


@torch.no_grad()
def test_padding_or_neighbours_that_change_a_sentence_are_noticed(monkeypatch):
    model = FAMILIES["bert"].build()
    own = lane(model, "encoder", ids_for(), 0, "eager")
    assert own.check()["ok"]
    forward = own._forward
    monkeypatch.setattr(own, "_forward", lambda: forward() + 1e-3)
    assert not own.check()["ok"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["mistral-sliding", "bert"])
def test_a_compiled_model_is_checked_and_never_compiled_again(name, monkeypatch):
    """With a backend that compiles nothing: capture, static cache and guards are PyTorch's own."""
    monkeypatch.setattr(serve_lanes, "OPTIONS", {"backend": "eager"})
    model = FAMILIES[name].build()
    kind = "decoder" if FAMILIES[name].decoder else "encoder"
    with compiling(("compile",)):
        own = lane(model, kind, ids_for(), 6, "compile")
        with settled("compile"):
            assert own.check()["ok"]
            own.round()
    assert own.compile_s > 0


@torch.no_grad()
def test_a_compiled_model_that_prefers_another_token_is_refused(monkeypatch):
    monkeypatch.setattr(serve_lanes, "OPTIONS", {"backend": "eager"})
    model = FAMILIES["llama-mha"].build()
    with compiling(("compile",)):
        own = Decoding(model, ids_for(), 6, "compile")
    step = own._step

    def wrong(*words, **more):
        output = step(*words, **more)
        output.logits = -output.logits
        return output

    own._step = wrong
    found = own.check()
    assert not found["ok"]
    assert found["gap"] > found["bound"]


def test_what_cannot_be_compiled_says_why_and_costs_no_figures(tmp_path, monkeypatch, capsys):
    def fails(*words, **more):
        raise RuntimeError("\nno C++ compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", fails)
    words = (str(MODEL), "--mode", "eager,compile", "--batch", "1", "--prompt", "8")
    eager, compiled = run(tmp_path, *words)["entries"]
    assert eager["reason"] is None
    assert eager["decode_s"]["p50"] > 0
    assert compiled["reason"] == "cannot be compiled: RuntimeError: no C++ compiler here"
    assert compiled["decode_s"] is compiled["compile_s"] is None
    assert "no C++ compiler here" in capsys.readouterr().out


@pytest.mark.slow
def test_the_real_compiler_gives_the_tokens_of_generate(tmp_path):
    words = (str(MODEL), "--mode", "compile", "--batch", "1", "--prompt", "8")
    (entry,) = run(tmp_path, *words)["entries"]
    assert entry["reason"] is None
    assert entry["check"]["ok"]
    assert entry["compile_s"] > 0


# -- the file ------------------------------------------------------------------------------------


def test_a_dense_and_a_pruned_folder_of_layers_of_their_own(tmp_path, capsys):
    pruned = tmp_path / "pruned"
    recipe = Recipe(
        sparsity=0.4,
        target="ffn,heads",
        allocation="ranked",
        calibration=str(CALIBRATION),
        samples=16,
        seq_len=64,
        device="cpu",
    )
    compress(MODEL, pruned, recipe)
    result = run(tmp_path, str(MODEL), str(pruned), "--batch", "2,1", "--prompt", "12,8")
    assert result["benchmark"] == "serve"
    assert result["dense"] == "model"
    assert {"torch", "transformers", "device", "threads"} <= set(result["environment"])
    assert set(result["machine"]) == {"before", "after"}
    assert result["problems"] == []
    names = [own["name"] for own in result["models"]]
    assert names == ["model", "pruned"]
    for own, folder in zip(result["models"], (MODEL, pruned), strict=True):
        assert own["file_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        assert sum(own["parts"].values()) == own["parameters"]
    assert result["models"][1]["widths"] == layout.read(layout.empty(json_of(pruned)))
    works = [(e["batch"], e["prompt"]) for e in result["entries"][::2]]
    assert works == [(1, 8), (1, 12), (2, 8), (2, 12)]
    for at, (dense, small) in enumerate(
        zip(result["entries"][::2], result["entries"][1::2], strict=True)
    ):
        assert dense["speedup"] is None
        for own in (dense, small):
            assert own["check"]["ok"]
            assert (own["kind"], own["mode"], own["dtype"]) == ("decoder", "eager", "float32")
            for phase in ("prefill_s", "decode_s", "generate_s"):
                assert 0 < own[phase]["p20"] <= own[phase]["p50"] <= own[phase]["p80"]
            rate = own["batch"] / own["decode_s"]["p50"]
            assert own["tokens_per_s"] == pytest.approx(rate, rel=1e-3)
            assert own["process_peak_bytes"] == PEAKS[at]
            assert own["peak_memory_bytes"] == PEAKS[at] - 40_000_000
            assert own["load_s"] == 0.5
            for bound in own["bound"].values():
                assert sum(bound["shares"].values()) == pytest.approx(1)
        ratio = dense["parameters"] / small["parameters"]
        assert small["speedup"]["parameters"] == pytest.approx(ratio)
        for phase in ("prefill", "decode", "generate"):
            own = small["speedup"][phase]
            assert own["low"] <= own["median"] <= own["high"]
    assert "batch 2, 12 tokens a prompt, 4 new" in capsys.readouterr().out


def json_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_encoders_have_sentences_a_second(tmp_path, capsys):
    FAMILIES["bert"].build().save_pretrained(tmp_path / "bert")
    words = (str(tmp_path / "bert"), f"{tmp_path / 'bert'}@0.5", "--batch", "3", "--prompt", "8")
    dense, small = run(tmp_path, *words)["entries"]
    for own in (dense, small):
        assert own["kind"] == "encoder"
        assert own["new_tokens"] == 0
        assert own["decode_s"] is own["tokens_per_s"] is None
        rates = own["sentences_per_s"]
        assert rates["p20"] <= rates["p50"] <= rates["p80"]
        assert rates["p50"] == pytest.approx(3 / own["prefill_s"]["p50"], rel=1e-3)
    assert small["random"]
    assert small["file_bytes"] is None
    assert small["speedup"]["prefill"]["median"] > 0
    assert "sentences/s" in capsys.readouterr().out


def test_a_family_without_an_adapter_is_timed_without_shares(tmp_path):
    UNLISTED["gptj"].build().save_pretrained(tmp_path / "neox")
    words = (str(tmp_path / "neox"), str(tmp_path / "neox"), "--batch", "1", "--prompt", "8")
    result = run(tmp_path, *words)
    assert [own["name"] for own in result["models"]] == ["neox", "neox (2)"]
    assert result["models"][0]["widths"] is None
    assert result["entries"][1]["speedup"]["why"] == {"prefill": None, "decode": None}
    assert result["entries"][1]["bound"] is None


def test_an_interruption_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    rounds, calls = Decoding.round, []

    def interrupted(self):
        calls.append(self)
        if len(calls) > 4:  # two rounds that warm up, and two of the first workload
            raise KeyboardInterrupt
        return rounds(self)

    monkeypatch.setattr(Decoding, "round", interrupted)
    file = tmp_path / "serve.json"
    words = [str(MODEL), "--batch", "1,2", "--prompt", "8", "--new-tokens", "3", "--repeats", "2"]
    assert main(["bench", "serve", *words, "--device", "cpu", "--json", str(file)]) == 2
    assert f"interrupted; {file} has what was measured" in capsys.readouterr().err
    assert [own["batch"] for own in json.loads(file.read_text())["entries"]] == [1]


@pytest.mark.parametrize("where", ["check", "round"])
def test_what_does_not_fit_is_named_and_the_rest_is_measured(where, tmp_path, monkeypatch, capsys):
    real = getattr(Decoding, where)

    def large(self, *words):
        if self._ids.shape[0] > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        return real(self, *words)

    monkeypatch.setattr(Decoding, where, large)
    file = tmp_path / "serve.json"
    words = [str(MODEL), "--batch", "1,2", "--prompt", "8", "--new-tokens", "3", "--repeats", "2"]
    assert main(["bench", "serve", *words, "--device", "cpu", "--json", str(file)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: model (eager, batch 2, prompt 8): out of memory; lower --batch")
    one, two = json.loads(file.read_text())["entries"]
    assert one["decode_s"]["p50"] > 0
    assert (two["decode_s"], two["reason"]) == (None, "out of memory")


def test_weights_that_do_not_fit_end_it_in_a_line(monkeypatch, capsys):
    def fails(*words):
        raise MemoryError

    monkeypatch.setattr(serve, "serve", fails)
    assert main(["bench", "serve", str(MODEL), "--device", "cpu"]) == 1
    assert "out of memory with the weights of model, model 1 of 1" in capsys.readouterr().err


# -- which models --------------------------------------------------------------------------------


def test_shapes_have_the_widths_of_equal_pruning():
    dense, half, aligned = (
        outline(own, round_to=round_to)
        for own, round_to in zip(
            sources([str(MODEL), f"{MODEL}@0.5", f"{MODEL}/config.json@0.3"], False),
            (1, 1, 64),
            strict=True,
        )
    )
    assert [own["ffn"] for own in dense.widths] == [512] * 5
    assert half.widths == [{"heads": 2, "ffn": 256}] * 5
    assert all(own["ffn"] % 64 == 0 for own in aligned.widths)
    assert (half.name, aligned.name) == ("model@0.5", "model@0.3")
    assert half.source.random
    assert not dense.source.random


@pytest.mark.parametrize(
    ("name", "parameters"), [("llama-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248)]
)
def test_the_shapes_for_the_gpu_are_what_they_are_called(name, parameters):
    (dense, pruned) = sources([str(SHAPES / name), f"{SHAPES / name}@0.5"], True)
    assert parameter_count(layout.empty(outline(dense).data)) == parameters
    found = outline(pruned, round_to=64)
    assert all(own["ffn"] % 64 == 0 for own in found.widths)
    assert found.kind == "decoder"
    layers = parameters - 2 * 4096 * found.vocabulary
    left = parameter_count(layout.empty(found.data)) - 2 * 4096 * found.vocabulary
    assert left / layers == pytest.approx(0.5, abs=1e-3)


def test_the_step_for_the_gpu_with_small_shapes(tmp_path):
    """As `gpu.sh` asks for it, but for device and sizes."""
    data = json_of(SHAPES / "llama-7b")
    data |= {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    data |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    data |= {"vocab_size": 97}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(data))
    models = [str(tmp_path / "tiny") + share for share in ("", "@0.3", "@0.5")]
    words = ("--random", "--dtype", "bfloat16", "--round-to", "auto", "--batch", "1,4")
    result = run(tmp_path, *models, *words, "--prompt", "16")
    assert {own["dtype"] for own in result["entries"]} == {"bfloat16"}
    assert all(own["random"] and own["reason"] is None for own in result["entries"])
    # 256 is so narrow that auto is 8
    assert all(w["ffn"] % 8 == 0 for own in result["models"] for w in own["widths"])
    assert len(result["entries"]) == 6


def test_names_are_unique(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "out").mkdir(parents=True)
    given = [str(tmp_path / parent / "out") for parent in ("a", "b", "a")]
    assert [own.name for own in sources(given, True)] == [*given[:2], f"{given[0]} (2)"]


def test_random_numbers_of_a_vocabulary():
    found = drawn(3, 50, 5, CPU)
    assert found.shape == (3, 50)
    assert set(found.flatten().tolist()) == {3, 4}
    assert torch.equal(found, drawn(3, 50, 5, CPU))


def test_usual_prompts_are_cut_to_what_the_models_take():
    found = workloads([outline(sources([str(MODEL)], False)[0])], (1,), None, 32)
    assert [work.prompt for work in found] == [128, 224]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--batch", "one"], "--batch one: must be whole numbers, separated by commas"),
        (["--prompt", "250"], "--prompt 250 with --new-tokens 32: model takes 256 tokens in all"),
        (["--new-tokens", "1"], "--new-tokens 1: must be at least 2"),
        (["--new-tokens", "256"], "give fewer --new-tokens"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--mode", "fast"], "--mode fast: choose from eager, compile"),
        (["--dtype", "int8"], "--dtype int8: choose from"),
        (["--round-to", "8"], "--round-to and --target are of shapes"),
        ([f"{MODEL}@1.5"], "what follows @ is a sparsity above 0 and below 1"),
        ([f"{MODEL}@0.5", "--round-to", "none.json"], "neither a number nor auto, and no such"),
        ([f"{MODEL}@0.5", "--round-to", "0"], "--round-to 0: must be a whole number"),
        ([f"{MODEL}@0.5", "--target", "mlp"], "--target mlp: choose from ffn, heads"),
        ([f"{MODEL}@0.99"], "at most 0.9303 can be removed"),
        (["/nonexistent/model"], "/nonexistent/model: no such folder"),
        ([f"{MODEL}/tokenizer.json"], "is a file; give a folder, or its config.json"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is_loaded(
    words, says, monkeypatch, capsys
):
    def loads(*words):
        raise AssertionError("it was loaded")

    monkeypatch.setattr(serve, "serve", loads)
    assert main(["bench", "serve", str(MODEL), *words, "--device", "cpu"]) == 2
    (line,) = [own for own in capsys.readouterr().err.splitlines() if own.startswith("error")]
    assert says in line


def test_models_that_answer_nothing_are_refused(tmp_path, capsys):
    from transformers import ResNetConfig, T5Config

    ResNetConfig(architectures=["ResNetForImageClassification"]).save_pretrained(tmp_path / "r")
    t5 = T5Config(architectures=["T5ForConditionalGeneration"], num_layers=1, d_model=8, d_ff=8)
    t5.save_pretrained(tmp_path / "t5")
    FAMILIES["bert"].build().save_pretrained(tmp_path / "bert")
    for words, says in (
        ([str(tmp_path / "r"), "--random"], "takes pixel_values; liar bench serve times decoders"),
        ([str(tmp_path / "t5"), "--random"], "it is an encoder-decoder"),
        ([str(MODEL), str(tmp_path / "bert")], "model (decoder), bert (encoder)"),
        ([str(tmp_path / "t5")], "or time its shape with --random weights"),
    ):
        if says.startswith("or time"):
            (tmp_path / "t5" / "config.json").write_text((MODEL / "config.json").read_text())
        assert main(["bench", "serve", *words, "--device", "cpu"]) == 2
        assert says in capsys.readouterr().err


# -- what it says --------------------------------------------------------------------------------


def test_a_decoder_is_as_long_as_its_prompt_and_its_further_tokens():
    found = whole({"prefill": [1.0, 2.0], "decode": [0.5, 0.25]}, Work(1, 8, 5))
    assert found["generate"] == [3.0, 3.0]


@torch.no_grad()
def test_work_is_what_pytorch_counts():
    """Multiplications by torch's own counter, of attention that is not fused away."""
    from torch.utils.flop_counter import FlopCounterMode

    family = FAMILIES["llama-gqa-biases"]
    model = family.build()
    model.set_attn_implementation("eager")
    served = served_of(model)
    ids = ids_for(2, 16)
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=True, logits_to_keep=1)
    own = work_of(served, 2, 16, 4, 0.0)["prefill"]["flops"]
    # attention without a fused kernel computes the half that causality hides, too, and rotary
    # tables are products of positions: 2 * positions * head_dim / 2, once for all sequences
    hidden = own["attention"] * (2 * 16 / 17 - 1)
    rotary = 2 * 16 * 4 / 2
    counted = counter.get_total_flops()
    assert counted == pytest.approx(sum(own.values()) + hidden, abs=4 * rotary)


def served_of(model):
    from liar_ext.bench.serve_models import Outline, Served, Source

    source = Source("model", "model", ".", True)
    known = Outline(source, {}, "decoder", layout.read(model), 64, 97)
    return Served(known, model, None)


@torch.no_grad()
def test_bytes_are_those_of_weights_and_of_keys_and_values():
    model = FAMILIES["llama-gqa-biases"].build()
    decoding = Decoding(model, ids_for(2, 10), 4, "eager")
    # 2 sequences, 2 layers, keys and values, 4 groups of 4, float32; 10 and on average 2 more
    assert decoding.cache_bytes() == 2 * 2 * 2 * 4 * 4 * 4 * 12
    served = served_of(model)
    own = work_of(served, 2, 10, 4, decoding.cache_bytes())["decode"]["bytes"]
    linears = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48)
    assert own == {"layers": 4 * linears, "head": 4 * 97 * 32, "attention": 2 * 2 * 2 * 4 * 4 * 48}
    assert sizes(served)["embeddings"] == sizes(served)["head"] == 97 * 32


def test_a_bound_is_the_larger_of_both_sides():
    ceilings = Ceilings(100.0, 10.0)
    work = {"flops": {"layers": 100.0, "head": 100.0}, "bytes": {"layers": 10.0, "head": 5.0}}
    assert ceilings.bound(work) == {
        "seconds": 2.0,
        "by": "compute",
        "shares": {"layers": 0.5, "head": 0.5},
    }
    work["bytes"]["head"] = 30.0
    assert ceilings.bound(work) == {
        "seconds": 4.0,
        "by": "memory",
        "shares": {"layers": 0.25, "head": 0.75},
    }


def bounded(seconds: float, of_bound: float) -> dict:
    shares = {"layers": 0.6, "attention": 0.01, "head": 0.39}
    own = {"seconds": seconds, "by": "memory", "shares": shares, "of_bound": of_bound}
    return {"bound": {"decode": own}}


def test_why_a_speed_up_is_less_than_the_sizes_promise():
    dense = bounded(2.0, 0.5)

    def said(median: float, of_bound: float = 0.4) -> str | None:
        own = {"median": median, "low": median - 0.01, "high": median + 0.01}
        return why("decode", bounded(1.6, of_bound) | {"speedup": {"decode": own}}, dense, 1.5)

    assert said(1.5) is None
    text = said(1.1)
    assert text.startswith("parameters promise 1.50 times, measured 1.10. Of what it reads: the ")
    assert "layers' linears 60%, the head 39%, which allows 1.25 times" in text
    assert "keys and values" not in text
    assert "60% of its time (50% of the dense model's) goes with launches" in text
    # as fast as what it reads allows: nothing else is to blame
    assert said(1.3).endswith("which allows 1.25 times")
    dense["bound"]["decode"]["of_bound"] = 1.4
    assert said(1.1).endswith("its weights come from the caches, faster than from memory")


# -- a process of its own ------------------------------------------------------------------------


@pytest.mark.usefixtures("own_process")
def test_loading_and_memory_are_of_a_process_of_its_own():
    (source,) = sources([str(MODEL)], False)
    works = [Work(1, 8, 4).to_json(), Work(64, 200, 4).to_json()]
    found = serve_probe.measured(
        source.to_json(), works, device="cpu", dtype="float32", round_to=1, target=("ffn",)
    )
    assert found["load_s"] > 0
    assert found["load_warm_s"] > 0
    assert found["import_s"] > 0
    small, large = found["peaks"]
    weights = 4 * 2_800_000
    assert small - found["base_bytes"] > weights
    # keys and values: 64 sequences of 203 tokens, 5 layers, 4 groups of 16, twice, in float32
    assert large - small > 64 * 203 * 5 * 2 * 4 * 16 * 4


@pytest.mark.usefixtures("own_process")
@pytest.mark.parametrize(
    ("ends", "says"),
    [("echo loading >&2; echo 'it is broken' >&2; exit 3", "it is broken"), ("kill -9 $$", "9")],
)
def test_a_process_that_ends_early_says_why(ends, says, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{ends}\n")
    python.chmod(0o755)
    monkeypatch.setattr(serve_probe.sys, "executable", str(python))
    (source,) = sources([str(MODEL)], False)
    found = serve_probe.measured(
        source.to_json(), [], device="cpu", dtype="float32", round_to=1, target=("ffn",)
    )
    assert says in found["reason"]
    assert set(found) == {"reason"}


def test_pages_of_a_file_are_forgotten(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"1" * 2**20)
    said = serve_probe.evict([file])
    assert said.startswith(("emptied of the weight files: ", "kept: "))
    assert file.read_bytes() == b"1" * 2**20


# -- the script and the page ---------------------------------------------------------------------


def script():
    spec = importlib.util.spec_from_file_location("liar_serve_script", ROOT / "benchmarks/serve.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_the_committed_page_is_what_the_committed_results_give():
    own = script()
    text = own.PAGE.read_text(encoding="utf-8")
    assert own.page(text, own.RESULTS) == text


def test_a_result_becomes_a_table(tmp_path):
    words = (str(MODEL), f"{MODEL}@0.5", "--batch", "1", "--prompt", "8")
    result = run(tmp_path, *words)
    result["entries"][1]["reason"] = "out of memory"
    (tmp_path / "serve-x-cpu-2026-01-02.json").write_text(json.dumps(result))
    (tmp_path / "serve-x-cpu-2026-01-01.json").write_text(json.dumps({"benchmark": "old"}))
    own = script()
    found = own.page(f"a {own.BEGIN} old {own.END} b", tmp_path)
    assert found.startswith(f"a {own.BEGIN}\n\n### ")
    assert found.endswith(f"{own.END} b")
    assert "`serve-x-cpu-2026-01-02.json`" in found
    assert "| 1 | 8 | eager | model@0.5 | out of memory |" in found


def test_intervals_of_ranks():
    """Against the binomial distribution by enumeration of all signs."""
    import itertools

    for count in range(1, 11):
        values = [float(n) for n in range(count)]
        found = measure.rank_interval(values)
        low, high = int(found["low"]), int(found["high"])
        assert low == count - 1 - high
        # the true median lies below value k if more than k of the draws are above it
        covered = sum(low < sum(signs) <= high for signs in itertools.product((0, 1), repeat=count))
        assert found["coverage"] == pytest.approx(covered / 2**count)
        assert found["coverage"] >= 0.95 or (low, high) == (0, count - 1)
    # of a table of the sign test
    assert measure.rank_interval(list(range(25)))["low"] == 7
