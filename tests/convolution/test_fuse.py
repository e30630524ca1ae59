"""From folder to folder: the result loads, says what it is, and nothing is half done."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from liar_families import tree_hash
from liar_images import LABELS, mobilenet, pictures, resnet, write_pictures
from PIL import Image
from safetensors.torch import save_file

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.convolution import FuseSettings, fuse, tables
from liar_ext.convolution.chain import Chain
from liar_ext.convolution.images import Images, read_images
from liar_ext.convolution.journal import TableFile
from liar_ext.convolution.measure import Quality, quality
from liar_ext.convolution.network import describe
from liar_ext.convolution.plan import best_plans
from liar_ext.convolution.run import beside
from liar_ext.convolution.tables import worth
from liar_ext.errors import Interrupted
from liar_ext.report.schema import Report

QUICK = {"repeats": 1, "largest_kernel": 3, "top": 2, "patches": 2048, "batch_size": 16}
# no plan is refused for its time: what a busy machine says is not what these tests are about
ANY = {**QUICK, "time": 1.0}


@pytest.fixture
def inputs(tmp_path):
    """A tiny dense network and its images."""
    resnet(depths=[1, 2]).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense", write_pictures(tmp_path / "images.npz")


def logits(model):
    with torch.no_grad():
        return model(pixel_values=pictures(5)[0]).logits


def run(inputs, out="out", **fields):
    dense, images = inputs
    settings = FuseSettings(images=str(images), **{**ANY, **fields})
    return fuse(dense, dense.parent / out, settings)


def fast_convolutions(monkeypatch):
    """As if fewer and smaller kernels were always faster, by a clock that does not shake."""

    def interleave(calls, rounds, device):
        def seconds(name):
            if name.startswith("network"):
                return 1.0
            return 0.05 if name.startswith("sum") else 0.15

        found = {name: [seconds(name)] * rounds for name in calls}
        plans = {name: [0.4] * rounds for name in calls if name.isdecimal()}
        return {**found, **plans, **({"dense": [1.0] * rounds} if "dense" in calls else {})}

    monkeypatch.setattr(tables, "interleave", interleave)
    monkeypatch.setattr("liar_ext.convolution.latency.interleave", interleave)


def test_the_result_loads_and_computes_the_same_everywhere(inputs, monkeypatch):
    fast_convolutions(monkeypatch)
    before = tree_hash(inputs[0])
    report = run(inputs, time=0.5)
    assert tree_hash(inputs[0]) == before
    out = inputs[0].parent / "out"
    network = report["network"]
    assert network["convolutions_after"] < network["convolutions_before"] == 6
    assert network["activations_after"] < network["activations_before"] == 6
    model = liar_ext.load(out)
    assert isinstance(model, transformers.ResNetForImageClassification)
    assert sum(p.numel() for p in model.parameters()) == report["totals"]["parameters_after"]
    model.save_pretrained(out.parent / "again")
    again = liar_ext.load(out.parent / "again")
    assert torch.equal(logits(again), logits(model))
    # what was measured is what was written
    held_out = read_images(inputs[1], inputs[0], model.config).split(0.25, 0)[1]
    found = quality(model, held_out, 16)
    assert found.accuracy == report["quality"]["final"]["accuracy"]
    assert found.loss == pytest.approx(report["quality"]["final"]["loss"], rel=1e-5)
    stored = json.loads((out / "liar_report.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert "least squares" in (out / "README.md").read_text()
    assert not beside(out).exists()
    with pytest.raises(InputError, match="convolutional network"):
        Report.read(out)


@pytest.mark.parametrize("where", ["out", "again"])
@pytest.mark.parametrize("by", ["family", "auto"])
def test_stock_loaders_refuse_it(inputs, where, by, monkeypatch):
    fast_convolutions(monkeypatch)
    run(inputs, time=0.5)
    out = inputs[0].parent / "out"
    liar_ext.load(out).save_pretrained(out.parent / "again")
    loader = {
        "family": transformers.ResNetForImageClassification,
        "auto": transformers.AutoModelForImageClassification,
    }[by]
    with pytest.raises((KeyError, ValueError), match="liar_ext"):
        loader.from_pretrained(out.parent / where)


def test_a_mobilenet_goes_the_same_way(tmp_path, monkeypatch):
    """Two blocks of it are enough: what else there is to merge is dropped from the list."""
    fast_convolutions(monkeypatch)
    mobilenet().save_pretrained(tmp_path / "dense")
    images = write_pictures(tmp_path / "images.npz", 24)
    every = Chain.segments

    def some(self, norms, largest):
        found = every(self, norms, largest)
        return [s for s in found if s in self.dense or (s.start, s.end) in ((6, 9), (9, 12))]

    monkeypatch.setattr(Chain, "segments", some)
    settings = FuseSettings(images=str(images), **{**ANY, "time": 0.999})
    monkeypatch.setattr(
        "liar_ext.convolution.run._plans",
        lambda options, length, whole, rest, settings: best_plans(
            [o for o in options if o.end - o.start != 1 or not 6 <= o.start < 12], length, 1e3
        ),
    )
    report = fuse(tmp_path / "dense", tmp_path / "out", settings)
    assert report["network"]["convolutions_after"] == 52 - 4
    model = liar_ext.load(tmp_path / "out")
    assert isinstance(model, transformers.MobileNetV2ForImageClassification)
    assert model(pixel_values=pictures(2)[0]).logits.shape == (2, LABELS)
    # an odd size, that TensorFlow pads in another way
    assert model(pixel_values=pictures(2, side=33)[0]).logits.shape == (2, LABELS)


def test_no_plan_that_is_fast_enough_says_which_is(inputs, monkeypatch, capsys):
    fast_convolutions(monkeypatch)
    dense, images = inputs
    arguments = ["fuse", str(dense), "--out", str(dense.parent / "out"), "--images", str(images)]
    arguments += ["--repeats", "1", "--largest-kernel", "3"]
    assert main([*arguments, "--time", "0.01"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --time 0.01: no plan is that fast; the fastest is predicted")
    assert not (dense.parent / "out").exists()
    # what was measured is kept, and another budget starts from it
    assert beside(dense.parent / "out").exists()
    monkeypatch.setattr(tables, "_measured", None)
    assert main([*arguments, "--time", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["latency"]["asked"] == 0.5


def test_an_interrupted_run_keeps_what_it_measured(inputs, monkeypatch):
    fast_convolutions(monkeypatch)
    expected = run(inputs, "whole", time=0.5)
    measured = tables._measured
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(tables, "_measured", interrupted)
    with pytest.raises(Interrupted, match="4 measurements are kept in .*out.tables.jsonl"):
        run(inputs, time=0.5)
    path = beside(inputs[0].parent / "out")
    # killed while it wrote a line
    with open(path, "ab") as file:
        file.write(b'{"segment": [0, 1')
    report = run(inputs, time=0.5)
    left = expected["table"]["segments"] - 6 - 3
    assert len(calls) == 4 + left, "three were not measured again"
    assert report["plan"] == expected["plan"]
    assert report["quality"] == expected["quality"]


@pytest.fixture
def measured(inputs, tmp_path, monkeypatch):
    """A table that is whole, as JSON lines, and the run that starts from it."""
    fast_convolutions(monkeypatch)
    dense, images = inputs
    path, settings = tmp_path / "t.jsonl", FuseSettings(images=str(images), **ANY)
    fuse(dense, tmp_path / "first", settings, tables=path)
    # nothing has to be measured again
    monkeypatch.setattr(tables, "_measured", None)
    monkeypatch.setattr(tables, "interleave", None)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return path, lines, lambda: fuse(dense, tmp_path / "out", settings, tables=path)


def _times(lines):
    return next(line["latency"] for line in lines if "latency" in line)


def _row(lines):
    return next(line for line in lines if "segment" in line)


# name -> (what is done to the lines, what is said of it)
ROWS = {
    "segment": (
        lambda x: _row(x).update(segment=[0, 99, 3]),
        "segment 0-99 with kernel 3 is of no",
    ),
    "kernel": (lambda x: _row(x)["segment"].__setitem__(2, 77), "with kernel 77 is of no segment"),
    "dense": (lambda x: _row(x).update(segment=[0, 1, 3]), "segment 0-1 with kernel 3 is of no"),
    "kept": (lambda x: _row(x)["importance"].update(kept=[42]), "keeps [42], and here it keeps ["),
    "no loss": (lambda x: _row(x)["importance"].pop("loss"), "lacks a number: loss or accuracy"),
    "a word": (lambda x: _row(x)["importance"].update(accuracy="x"), "lacks a number"),
    "no row": (lambda x: _row(x).update(importance=[1]), "lacks a number"),
    "no work": (lambda x: _times(x).pop("network folded"), "lacks 'network folded'"),
    "other work": (lambda x: _times(x).update({"conv 3x9x9": [1.0]}), "has 'conv 3x9x9', which is"),
    "nothing": (lambda x: _times(x).update({"network folded": []}), "no times above 0 for 'netw"),
    "no time": (lambda x: _times(x).update({"network stock": [0.0]}), "no times above 0 for 'netw"),
    "more": (
        lambda x: _times(x)["network stock"].append(1.0),
        "more rounds of some than of others",
    ),
    "list": (
        lambda x: next(y for y in x if "latency" in y).update(latency=[1]),
        "no times by name",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_table_with_a_row_that_is_not_of_this_network_is_refused(measured, name):
    path, lines, run_again = measured
    change, says = ROWS[name]
    change(lines)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    before = path.read_bytes()
    with pytest.raises(InputError) as found:
        run_again()
    message = str(found.value)
    assert message.startswith(f"{path}: ") and says in message
    assert message.endswith("; delete the file, or give another --tables")
    assert path.read_bytes() == before
    assert not (path.parent / "out").exists()


def test_a_table_that_is_whole_or_only_begun_is_taken(measured, monkeypatch):
    path, lines, run_again = measured
    whole = run_again()
    assert whole["plan"]
    # the last of the segments was not measured yet: it is now, and nothing else
    last = lines.pop()["importance"]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    calls = []
    monkeypatch.setattr(tables, "_measured", lambda *given: calls.append(given) or last)
    shutil.rmtree(path.parent / "out")
    assert run_again()["plan"] == whole["plan"]
    assert len(calls) == 1


def test_a_table_of_something_else_is_refused(inputs, tmp_path, monkeypatch):
    fast_convolutions(monkeypatch)
    dense, images = inputs
    settings = FuseSettings(images=str(images), **ANY)
    fuse(dense, tmp_path / "out", settings, tables=tmp_path / "t.jsonl")
    other = FuseSettings(images=str(images), **{**ANY, "repair": "none"})
    with pytest.raises(InputError, match="--tables: repair is none, and liar in .*t.jsonl"):
        fuse(dense, tmp_path / "more", other, tables=tmp_path / "t.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"version": 1}\n')
    with pytest.raises(InputError, match="is no table of `liar fuse`"):
        TableFile(tmp_path / "bad.jsonl", {})
    (tmp_path / "old.jsonl").write_text('{"version": 0, "identity": {}}\n')
    with pytest.raises(InputError, match="of another release"):
        TableFile(tmp_path / "old.jsonl", {})


def test_training_goes_down_and_says_so(inputs, monkeypatch):
    fast_convolutions(monkeypatch)
    report = run(inputs, time=0.5, finetune_steps=12, learning_rate=1e-2, table_steps=1)
    training = report["training"]
    assert training["steps"] == 12 and training["images"] == 12 * 16
    assert training["log"][-1]["loss"] < training["log"][0]["loss"]
    assert report["quality"]["final"] != report["quality"]["repaired"]


def test_what_a_segment_is_worth():
    dense, found = Quality(0.5, 0.9), Quality(0.75, 0.8)
    assert worth("loss", found, dense) == -0.25
    assert worth("accuracy", found, dense) == pytest.approx(-0.1)
    assert worth("paper", found, dense) == pytest.approx(np.exp(-0.1))
    # by the paper, two segments that do no harm are worth twice as much as one
    assert worth("paper", dense, dense) == 1.0
    assert worth("loss", dense, dense) == worth("accuracy", dense, dense) == 0.0


def test_image_folders_use_the_networks_own_processor(inputs, tmp_path):
    dense, _ = inputs
    model = liar_ext.load(dense)
    processor = transformers.ConvNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_pct=1.0, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    for name in "dcba":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        shade = 60 * "abcd".index(name)
        Image.new("RGB", (40, 36), (shade,) * 3).save(tmp_path / "pictures" / name / "one.png")
    config = transformers.ResNetConfig(num_labels=LABELS)
    with pytest.raises(InputError, match=r"no preprocessor_config.json"):
        read_images(tmp_path / "pictures", dense, config)
    processor.save_pretrained(dense)
    found = read_images(tmp_path / "pictures", dense, config)
    assert found.labels.tolist() == [0, 1, 2, 3] and found.pixels.shape == (4, 3, 32, 32)
    shades = [60 / 127.5 * n - 1 for n in range(4)]
    torch.testing.assert_close(found.pixels.mean((1, 2, 3)), torch.tensor(shades))
    config.id2label = dict(enumerate("dcba"))
    config.label2id = {name: label for label, name in enumerate("dcba")}
    named = read_images(tmp_path / "pictures", dense, config)
    assert named.labels.tolist() == [3, 2, 1, 0]
    (tmp_path / "pictures" / "a").rename(tmp_path / "pictures" / "e")
    with pytest.raises(InputError, match="folder 'e' is none of the network's labels"):
        read_images(tmp_path / "pictures", dense, config)
    (tmp_path / "pictures" / "e" / "one.png").write_bytes(b"no image")
    (tmp_path / "pictures" / "e").rename(tmp_path / "pictures" / "a")
    with pytest.raises(InputError, match="one.png: cannot be read as an image"):
        read_images(tmp_path / "pictures", dense, config)
    assert model.config.num_labels == LABELS


PIXELS, KINDS = pictures(8)
BAD = {
    "labels above": (
        {"images": PIXELS, "labels": KINDS + 3},
        "labels 3 to 6, the network has 0 to 3",
    ),
    "labels below": ({"images": PIXELS, "labels": KINDS - 1}, "labels -1 to 2"),
    "no numbers": ({"images": PIXELS, "labels": KINDS.float()}, "labels are torch.float32"),
    "bytes": ({"images": (PIXELS * 9).byte(), "labels": KINDS}, "images are torch.uint8"),
    "fewer labels": ({"images": PIXELS, "labels": KINDS[:5]}, r"labels \(5,\)"),
    "channels": ({"images": PIXELS.repeat(1, 3, 1, 1), "labels": KINDS}, "3 channels, the network"),
    "no labels": ({"images": PIXELS, "x": KINDS}, "has no array labels, but images, x"),
    "NaN": ({"images": PIXELS * torch.nan, "labels": KINDS}, "NaN or infinite"),
    "one": ({"images": PIXELS[:2], "labels": KINDS[:2]}, "2 images are too few"),
    "no pixels": ({"images": PIXELS[..., :0], "labels": KINDS}, "each at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_images_that_cannot_be_used_are_one_line(inputs, tmp_path, name, capsys):
    arrays, message = BAD[name]
    save_file({k: v.contiguous() for k, v in arrays.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=message):
        run((inputs[0], tmp_path / "bad.safetensors"))
    assert not (tmp_path / "out").exists()


def test_other_input_that_cannot_be_used_is_one_line(inputs, tmp_path, capsys):
    dense, images = inputs
    (tmp_path / "text.txt").write_text("no images")
    (tmp_path / "broken.npz").write_text("no images")
    (tmp_path / "empty").mkdir()
    transformers.BertModel(
        transformers.BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path / "bert")
    out = ["--out", str(tmp_path / "out")]
    given = [*out, "--images", str(images), "--time", "0.5"]
    cases = [
        ([str(tmp_path / "bert"), *given], "BertModel (model type 'bert') is no convolutional"),
        ([str(dense), *given, "--time", "1.5"], "--time 1.5: must be above 0, and 1 at most"),
        ([str(dense), *given, "--top", "0"], "--top 0: must be at least 1"),
        ([str(dense), *given, "--repair", "x"], "--repair x: choose from liar, none"),
        ([str(dense), *given, "--lr", "0"], "--lr 0.0: must be above 0"),
        ([str(dense), *given, "--images", str(tmp_path / "no.npz")], "not found"),
        ([str(dense), *given, "--images", str(tmp_path / "text.txt")], "is neither a folder nor"),
        ([str(dense), *given, "--images", str(tmp_path / "broken.npz")], "cannot be read"),
        ([str(dense), *given, "--images", str(tmp_path / "empty")], "no preprocessor_config.json"),
        ([str(tmp_path / "empty"), *given], "config.json: missing"),
        ([str(dense), *out, "--time", "0.5"], "required: --images"),
        ([str(dense), "--out", str(dense), *given[2:]], "overlaps the source"),
    ]
    for arguments, message in cases:
        try:
            code = main(["fuse", *arguments])
        except SystemExit as error:
            code = error.code
        error = capsys.readouterr().err.splitlines()
        assert code == 2 and message in error[-1], (arguments, error)
        assert error[-1].startswith("error: ")
    shutil.copytree(dense, tmp_path / "fused")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    (tmp_path / "fused" / "config.json").write_text(json.dumps(describe(config, [])))
    assert main(["fuse", str(tmp_path / "fused"), *given]) == 2
    assert "was written by `liar fuse`" in capsys.readouterr().err
    with pytest.raises(InputError, match="segments end at 0 of 6"):
        liar_ext.load(tmp_path / "fused")
    assert not (tmp_path / "out").exists()


def test_a_split_has_every_image_once():
    pixels = torch.arange(10.0).reshape(10, 1, 1, 1)
    kept, out = Images(pixels, torch.arange(10)).split(0.3, 1)
    assert len(kept) == 7 and len(out) == 3
    assert sorted([*kept.labels.tolist(), *out.labels.tolist()]) == list(range(10))
    assert torch.equal(kept.pixels.flatten().long(), kept.labels)
