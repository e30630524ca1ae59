"""A window of layers is replaced by one that is trained; all others stay; nothing is half done."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from liar_depth import MODELS, build
from liar_families import outputs, probe_tokens, randomise, tree_hash, write_tokens
from safetensors.torch import load_file

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.cli.replace import replacement_of
from liar_ext.depth import surgery
from liar_ext.depth.replace import Replacement, replace_layers
from liar_ext.depth.replace.network import random_weights
from liar_ext.models import adapter_for, layout
from liar_ext.recovery import Schedule, TextTraining, TrainingState

SIZES = ["--steps", "6", "--lr", "1e-2", "--batch-size", "2", "--accumulation", "2"]
SIZES += ["--seq-len", "24", "--save-every", "2"]


def command(tmp_path, out, *more, name="llama"):
    """`build(name)` in bfloat16 and a text, and the command on them."""
    if not (tmp_path / "dense").exists():
        build(name).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
        write_tokens(tmp_path / "tokens.npy", samples=30)
    text = ["--train", str(tmp_path / "tokens.npy"), *SIZES]
    return ["replace", str(tmp_path / "dense"), "--out", str(tmp_path / out), *text, *more]


def weights(folder):
    return load_file(folder / "model.safetensors")


def report_of(folder):
    return json.loads((folder / "liar_report.json").read_text())


def error_of(capsys):
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.mark.parametrize("loss", ["mse", "lm"])
def test_one_layer_stands_in_and_is_trained_alone(tmp_path, loss, capsys):
    build_command = command(tmp_path, "out", "--window", "1-3", "--loss", loss)
    before = tree_hash(tmp_path / "dense")
    assert main(build_command) == 0
    assert tree_hash(tmp_path / "dense") == before
    printed = capsys.readouterr().out
    assert "layers 1 to 3 replaced by layer 1, trained: layers 6 -> 4" in printed
    assert "parameters for 6 steps: held-out loss" in printed
    model = build("llama").to(torch.bfloat16)
    removed = dict(surgery(model, [0, 1, 4, 5]).named_parameters())
    trained = weights(tmp_path / "out")
    assert trained.keys() == removed.keys()
    for name, value in trained.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, removed[name]) != name.startswith("model.layers.1."), name
    report = report_of(tmp_path / "out")
    assert report["layers"] == {
        "before": 6,
        "after": 4,
        "replaced": [1, 2, 3],
        "trained": [1],
        "measured": {},
    }
    told = report["training"]
    assert (told["steps"], told["tokens"], told["windows"]) == (6, 6 * 2 * 2 * 24, 27)
    assert ("nothing" in told) == (loss == "mse")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "tokens.npy", "out"}
    assert report["calibration"]["source"].endswith("tokens.npy")
    # as stock as the source
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), "nothing new, missing or left over"
    assert torch.equal(outputs(loaded.eval()), outputs(liar_ext.load(tmp_path / "out")))
    assert (
        "Layers 1 to 3, counted from 0, were replaced by layer 1"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_training_brings_the_states_nearer(tmp_path):
    """Repeated tokens can be learned; with nothing in their place the layers are missed more."""
    assert main(command(tmp_path, "out", "--drop", "2", "--steps", "40", "--floor", "0")) == 0
    told = report_of(tmp_path / "out")["training"]
    looks = told["held_out"]
    assert told["log"][-1]["loss"] < 0.9 * told["log"][0]["loss"]
    kept = next(look["loss"] for look in looks if look["step"] == told["kept"])
    assert kept == min(look["loss"] for look in looks) < looks[0]["loss"] < told["nothing"]


@pytest.mark.parametrize("loss", ["mse", "lm"])
def test_an_interrupted_training_goes_on_to_the_same_files(tmp_path, loss, capsys, monkeypatch):
    options = ["--drop", "2", "--loss", loss]
    assert main(command(tmp_path, "whole", *options)) == 0
    save, saved = TrainingState.save, []

    def interrupted(self, step, tensors, numbers):
        if saved:
            raise KeyboardInterrupt
        save(self, step, tensors, numbers)
        saved.append(step)

    monkeypatch.setattr(TrainingState, "save", interrupted)
    assert main(command(tmp_path, "out", *options)) == 2
    assert "interrupted; 2 steps of training are kept" in capsys.readouterr().err
    monkeypatch.setattr(TrainingState, "save", save)
    assert not (tmp_path / "out").exists()
    assert main(command(tmp_path, "out", *options)) == 2
    assert "an unfinished training is in" in error_of(capsys)
    other = ["--drop", "1", "--loss", loss, "--resume"]
    assert main(command(tmp_path, "out", *other)) == 2
    assert "--resume: replacement.drop is 1, and 2 in" in error_of(capsys)
    assert main(command(tmp_path, "out", *options, "--resume")) == 0
    assert not (tmp_path / ".out.train").exists()
    whole, resumed = (weights(tmp_path / folder) for folder in ("whole", "out"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    found, expected = (report_of(tmp_path / folder)["training"] for folder in ("out", "whole"))
    assert found["resumed_at"] == 2
    for name in ("log", "held_out", "kept"):
        assert found[name] == expected[name]


def test_the_schedule_ends_with_the_updates(tmp_path):
    """The published code steps it once per update over a horizon of half the batches."""
    options = ["--drop", "1", "--steps", "20", "--accumulation", "3", "--floor", "0.25"]
    assert main(command(tmp_path, "out", *options)) == 0
    log = report_of(tmp_path / "out")["training"]["log"]
    rates = [entry["rate"] for entry in log]
    assert [entry["step"] for entry in log] == list(range(1, 21))
    assert rates[0] == rates[1] == max(rates) == 1e-2
    assert 0.25e-2 < rates[-1] < 0.26e-2
    assert rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("loss", ["mse", "lm"])
def test_a_layer_is_not_taken_for_those_whose_names_begin_alike(tmp_path, loss):
    """`layers.2` is in `layers.20` too: the published code trains both."""
    config = transformers.LlamaConfig(**{**MODELS["llama"][1], "num_hidden_layers": 23})
    config.architectures = ["LlamaForCausalLM"]
    model = randomise(transformers.LlamaForCausalLM(config))
    model.save_pretrained(tmp_path / "dense")
    write_tokens(tmp_path / "tokens.npy", samples=30)
    assert main(command(tmp_path, "out", "--window", "2-3", "--loss", loss)) == 0
    kept = [layer for layer in range(23) if layer != 3]
    removed = dict(surgery(model, kept).named_parameters())
    changed = {n for n, v in weights(tmp_path / "out").items() if not torch.equal(v, removed[n])}
    assert {name.split(".")[2] for name in changed} == {"2"}


@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen3-windows", "gemma3", "llama-tied"])
def test_every_family_inherits_all_of_the_layer(tmp_path, name):
    """Also OPT, whose name the published code misspells, biases, and norms of queries and keys.

    A rate that changes nothing shows what training began from.
    """
    source = tmp_path / "called-llama"
    model = build(name)
    model.save_pretrained(source)
    write_tokens(tmp_path / "tokens.npy", samples=30)
    training = TextTraining(
        str(tmp_path / "tokens.npy"),
        Schedule(2, learning_rate=1e-30, batch_size=2),
        seq_len=24,
    )
    asked = Replacement(training, window=(2, 3), keep="last")
    report = replace_layers(source, tmp_path / "out", asked)
    expected = surgery(model, [0, 1, 2, 4, 5])
    model_class = getattr(transformers, MODELS[name][0])
    loaded, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), "nothing new, missing or left over"
    assert torch.equal(outputs(loaded.eval()), outputs(expected))
    path = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    own = sum(p.numel() for p in model.get_submodule(f"{path}.2").parameters())
    assert report["training"]["parameters"] == own


def test_several_layers_inherit_the_first_ones(tmp_path):
    options = ["--drop", "2", "--depth", "reverse", "--network", "layers", "--count", "2"]
    assert main(command(tmp_path, "out", *options, "--keep", "last")) == 0
    report = report_of(tmp_path / "out")
    assert (report["layers"]["replaced"], report["layers"]["trained"]) == ([2, 3, 4, 5], [2, 3])
    removed = dict(surgery(build("llama").to(torch.bfloat16), [0, 1, 2, 3]).named_parameters())
    trained = weights(tmp_path / "out")
    changed = {n for n, value in trained.items() if not torch.equal(value, removed[n])}
    assert {name.split(".")[2] for name in changed} == {"2", "3"}


@pytest.mark.parametrize(
    ("name", "network", "loss"),
    [
        ("llama", "swiglu", "mse"),
        ("llama", "swiglu", "lm"),
        ("qwen3-windows", "swiglu", "mse"),
        ("gpt2", "mlp", "mse"),
        ("opt", "mlp", "lm"),
    ],
)
def test_a_layer_without_attention_stands_in(tmp_path, name, network, loss, capsys):
    """What it begins as is the window's first layer whose attention says its bias only."""
    options = ["--window", "2-3", "--network", network, "--loss", loss, "--keep", "last"]
    base = command(tmp_path, "out", *options, name=name)
    assert main([*base, "--lr", "1e-30"]) == 0
    dense = liar_ext.load(tmp_path / "dense", dtype=torch.float32)
    expected = surgery(dense, [0, 1, 2, 4, 5])
    (site,) = adapter_for(expected.config).sites_of(expected, 2, ("heads",))
    site.consumer.weight.data.zero_()
    found = liar_ext.load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(outputs(found), outputs(expected), rtol=1e-4, atol=1e-4)
    tokens = probe_tokens(batch=2, length=7)
    generate = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = found.generate(tokens, use_cache=True, **generate)
    assert torch.equal(cached, found.generate(tokens, use_cache=False, **generate))
    with pytest.raises(Exception, match="liar_ext"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # trained, it alone is another
    before = weights(tmp_path / "out")
    assert main([*base, "--overwrite"]) == 0
    after = weights(tmp_path / "out")
    path = next(n for n, m in expected.named_modules() if isinstance(m, torch.nn.ModuleList))
    mine = {n for n in after if f"{path}.2." in n and after[n].numel()}
    changed = {n for n in after if not torch.equal(after[n], before[n])}
    # rounded to bfloat16 an update of a norm may not show
    assert changed <= mine and any("weight" in n and after[n].dim() > 1 for n in changed)
    assert report_of(tmp_path / "out")["training"]["parameters"] == sum(
        after[n].numel() for n in mine
    )
    assert "without its attention" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("loss", ["mse", "lm"])
@pytest.mark.parametrize("network", ["layer", "swiglu"])
def test_random_weights_are_the_seeds(tmp_path, network, loss):
    """Both losses begin with the same, and inherit nothing."""
    options = ["--window", "2-3", "--network", network, "--loss", loss, "--keep", "last"]
    base = command(tmp_path, "out", *options, "--init", "random", "--lr", "1e-30")
    assert main(base) == 0
    report = report_of(tmp_path / "out")
    layer = layout.empty(report["config"]).model.layers[2]
    for name, value in random_weights(layer, 0.02, 0 + 2).items():
        stored = weights(tmp_path / "out")[f"model.layers.2.{name}"]
        assert torch.equal(stored, value.to(torch.bfloat16)), name
    inherited = build("llama").to(torch.bfloat16).model.layers[2].mlp.up_proj.weight
    assert not torch.equal(
        weights(tmp_path / "out")["model.layers.2.mlp.up_proj.weight"], inherited
    )


def test_the_window_is_the_one_that_liar_prune_chooses(tmp_path):
    """Of so many layers as are replaced: the saved ones, and one for each that stands in."""
    assert main(command(tmp_path, "out", "--drop", "1")) == 0
    found = report_of(tmp_path / "out")["layers"]
    measured = found["measured"]["influence"]
    assert len(measured) == 5, "windows of two layers"
    first = min(range(5), key=measured.__getitem__)
    assert found["replaced"] == [first, first + 1]


def test_the_whole_model_can_be_the_window(tmp_path):
    assert main(command(tmp_path, "out", "--drop", "5")) == 0
    assert report_of(tmp_path / "out")["layers"]["replaced"] == list(range(6))
    assert liar_ext.load(tmp_path / "out").config.num_hidden_layers == 1


def test_bfloat16_is_trained_in_float32_and_nothing_is_held_out(tmp_path):
    options = ["--drop", "1", "--held-out", "0", "--loss-tokens", "normalised"]
    assert main(command(tmp_path, "out", *options)) == 0
    told = report_of(tmp_path / "out")["training"]
    assert (told["held_out"], told["kept"]) == ([], 6)
    assert "nothing" not in told
    assert "Its quality was not measured" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("network", ["layer", "swiglu"])
def test_the_result_is_replaced_once_more(tmp_path, network):
    """A model with shapes of its own, too, chosen by its hidden states."""
    assert main(command(tmp_path, "first", "--drop", "1", "--network", network)) == 0
    again = ["replace", str(tmp_path / "first"), "--out", str(tmp_path / "second")]
    again += ["--train", str(tmp_path / "tokens.npy"), *SIZES, "--drop", "1"]
    assert main([*again, "--network", network]) == 0
    found = liar_ext.load(tmp_path / "second")
    assert found.config.num_hidden_layers == 4
    assert torch.isfinite(outputs(found)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--drop", "6"], "--drop 6: 1 layer stands in for 7, and the model has 6; at most 5"),
        (["--drop", "5", "--network", "layers"], "2 layers stand in for 7, and the model has 6"),
        (["--drop", "1", "--network", "layers", "--count", "6"], "none can go"),
        (["--drop", "0"], "--drop 0: must be at least 1"),
        (["--window", "4-6"], "--window 4-6: the model has 6 layers, 0 to 5"),
        (["--window", "3"], "--window 3-3: 1 layer in the place of 1 saves nothing"),
        (["--window", "1,3"], "--window 1,3: must be layers in a row"),
        (["--window", "1-3", "--depth", "reverse"], "--depth: chooses a window"),
        (["--drop", "1", "--depth", "shortgpt"], "--depth shortgpt: choose from reverse, stream"),
        (["--drop", "1", "--count", "2"], "--count 2: is of --network layers"),
        (["--drop", "1", "--network", "mixer"], "--network mixer: choose from layer, layers, swi"),
        (["--drop", "1", "--network", "mlp"], "the FFN of a llama layer is gated; use swiglu"),
        (["--drop", "5", "--network", "swiglu"], "no layer with attention would be left"),
        (["--drop", "1", "--loss", "kl"], "--loss kl: choose from mse, lm"),
        (
            ["--drop", "1", "--loss", "lm", "--loss-tokens", "normalised"],
            "--loss-tokens normalised: is of --loss mse",
        ),
        (["--drop", "1", "--steps", "0"], "--steps 0: must be at least 1"),
        (["--drop", "1", "--train", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, capsys, options, words):
    assert main(command(tmp_path, "out", *options)) == 2
    assert words in error_of(capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "tokens.npy"}


def test_a_text_is_asked_for(tmp_path, capsys):
    base = ["replace", str(tmp_path), "--out", str(tmp_path / "out"), "--drop", "1"]
    assert main(base) == 2
    assert "--train is missing" in error_of(capsys)
    assert main([*base, "--train", "x.txt"]) == 2
    assert "for how long? give --steps N" in error_of(capsys)


def test_a_text_of_one_window_is_too_short_to_hold_some_out(tmp_path, capsys):
    base = command(tmp_path, "out", "--drop", "1")
    write_tokens(tmp_path / "tokens.npy", samples=1)
    assert main(base) == 2
    assert "one window of 24 tokens, and some are held out" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_an_encoder_is_refused(tmp_path, capsys):
    for loss, words in (("mse", "is no decoder"), ("lm", "predicts no next token")):
        assert main(command(tmp_path, "out", "--drop", "1", "--loss", loss, name="bert")) == 2
        assert words in error_of(capsys)


def test_a_family_without_an_adapter_needs_a_window(tmp_path, capsys):
    assert main(command(tmp_path, "out", "--drop", "1", name="gptj")) == 2
    assert "give --window A-B, or --depth reverse" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_each_loss_has_the_defaults_of_the_published_code(tmp_path):
    from liar_ext.cli import build_parser

    base = ["replace", "x", "--out", "y", "--drop", "1", "--train", "t", "--steps", "9"]
    for loss, clip, betas in (("mse", 5.0, (0.9, 0.999)), ("lm", 1.0, (0.9, 0.95))):
        asked = replacement_of(build_parser([]).parse_args([*base, "--loss", loss]))
        plan = asked.training.schedule
        assert (plan.clip, plan.betas, plan.floor) == (clip, betas, 0.25)
        assert (plan.weight_decay, plan.windows, plan.learning_rate) == (1e-3, 128, 2e-4)
    with pytest.raises(InputError, match="neither is given"):
        Replacement(asked.training)
