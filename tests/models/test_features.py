"""Models that read no tokens: ViT, and the encoder of Whisper. From a folder of files to a smaller
checkpoint, whose outputs are those of the model that was pruned in memory."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from liar_features import LENGTHS, MODELS, SHAPES, SMALL
from liar_testing import assert_close_rms
from safetensors.torch import save_file
from torch import Tensor

import liar_ext
from liar_ext import InputError, Recipe, planning
from liar_ext.cli import main
from liar_ext.engine.execution import Execution
from liar_ext.engine.inputs import load_calibration
from liar_ext.models import adapter_for, layout
from liar_ext.planning_tokens import features_bytes, tokens_of

SAMPLES = 14


def model_of(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config, cls, _ = MODELS[family]
    model = cls(config(**SMALL[family])).eval()
    # biases of zero, as they are made, would hide one that goes to the wrong place
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def samples(family: str, count: int = SAMPLES, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPES[family], generator=generator)


@torch.no_grad()
def outputs(model: transformers.PreTrainedModel, family: str) -> Tensor:
    values = {MODELS[family][2]: samples(family, 5, seed=2)}
    if family == "whisper":
        values["decoder_input_ids"] = torch.arange(4, 9)[:, None] + torch.arange(3)
    return model(**values).logits


@pytest.fixture(params=["vit", "whisper"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path, family: str) -> Path:
    """A model and its samples."""
    model_of(family).save_pretrained(tmp_path / "model")
    save_file({MODELS[family][2]: samples(family)}, tmp_path / "samples.safetensors")
    return tmp_path


def recipe(folder: Path, **changes: Any) -> Recipe:
    given = {"calibration": str(folder / "samples.safetensors"), "batch_size": 3, "samples": 14}
    return Recipe(**{"sparsity": 0.5, "target": ("ffn", "heads"), **given, **changes})


RECIPES: dict[str, dict[str, Any]] = {
    "both": {},
    "one pass": {"statistics": "oneshot"},
    "stream": {"target_signal": "stream"},
    "a ridge chosen": {"ridge": "auto"},
    "per layer": {"allocation": "global", "target": ("ffn",)},
    "nothing repaired": {"reconstruct": "none", "criterion": "magnitude"},
    "masks learned": {"criterion": "policy", "policy_steps": 3},
    "whole models tried": {
        "allocation": "level-swaps",
        "search_evaluations": 6,
        "search_samples": 4,
    },
    "a layer left out": {"depth": "shortgpt", "drop": 1, "sparsity": 0.3},
    "without attention": {"allocation": "levels", "empty": True, "target": ("heads",)},
}


@pytest.mark.parametrize("changes", RECIPES.values(), ids=RECIPES)
def test_files_hold_what_is_made_in_memory(folder, family, changes):
    wanted = recipe(folder, **changes)
    report = liar_ext.compress(folder / "model", folder / "out", wanted)
    loaded = liar_ext.load(folder / "out")
    assert type(loaded) is MODELS[family][1]
    model = model_of(family)
    values = samples(family)[list(report.calibration["sample_ids"])]
    liar_ext.prune(model, [{MODELS[family][2]: own} for own in values.split(3)], wanted)
    assert_close_rms(outputs(loaded, family), outputs(model, family).double(), 1e-5)
    assert report.calibration["tokens"] == SAMPLES * LENGTHS[family]
    assert report.calibration["seq_len"] == LENGTHS[family]
    # and it is another model than the dense one
    assert not torch.allclose(outputs(loaded, family), outputs(model_of(family), family))


def test_the_repair_follows_the_dense_outputs_better_than_none(folder, family):
    save_file({MODELS[family][2]: samples(family, 90)}, folder / "samples.safetensors")

    def error(**changes: Any) -> float:
        wanted = recipe(folder, samples=90, **changes)
        liar_ext.compress(folder / "model", folder / "out", wanted, overwrite=True)
        found = outputs(liar_ext.load(folder / "out"), family)
        return float((found - outputs(model_of(family), family)).square().mean())

    assert error(sparsity=0.3) < error(sparsity=0.3, reconstruct="none")


def test_stock_transformers_loads_what_its_config_states(folder, family):
    target = ("ffn", "heads") if family == "vit" else ("ffn",)
    wanted = recipe(folder, target=target)
    report = liar_ext.compress(folder / "model", folder / "out", wanted)
    assert report.layout == "stock"
    loaded, told = MODELS[family][1].from_pretrained(folder / "out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = liar_ext.load(folder / "out")
    assert torch.equal(outputs(loaded, family), outputs(own, family))
    if family == "whisper":
        # the decoder is the one it was
        assert loaded.config.decoder_ffn_dim == 40
        dense = model_of(family).model.decoder.state_dict()
        assert all(
            torch.equal(value, dense[name])
            for name, value in loaded.model.decoder.state_dict().items()
        )


def test_whisper_states_no_head_size(tmp_path):
    model_of("whisper").save_pretrained(tmp_path / "model")
    save_file({"input_features": samples("whisper")}, tmp_path / "samples.safetensors")
    report = liar_ext.compress(
        tmp_path / "model", tmp_path / "out", recipe(tmp_path, target=("heads",))
    )
    assert report.layout == "liar_ext"
    with pytest.raises(ValueError, match="liar_ext"):
        transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    generated = liar_ext.load(tmp_path / "out").generate(
        samples("whisper", 2), max_new_tokens=4, do_sample=False
    )
    assert generated.shape[0] == 2


def test_an_interrupted_run_goes_on_to_the_same_bytes(folder, monkeypatch):
    from liar_ext.engine.driver import Driver

    liar_ext.compress(folder / "model", folder / "whole", recipe(folder))
    shrink = Driver._shrink_layer

    def broken(self: Driver, index: int, position: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        shrink(self, index, position)

    monkeypatch.setattr(Driver, "_shrink_layer", broken)
    often = Execution(journal_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        liar_ext.compress(folder / "model", folder / "out", recipe(folder), execution=often)
    monkeypatch.setattr(Driver, "_shrink_layer", shrink)
    other = folder / "other.safetensors"
    name = next(iter(MODELS[f][2] for f in MODELS if MODELS[f][2] in _names(folder)))
    save_file({name: samples("vit" if name == "pixel_values" else "whisper", seed=9)}, other)
    again = Execution(resume=True)
    changed = recipe(folder, calibration=str(other))
    with pytest.raises(InputError, match="--resume: "):
        liar_ext.compress(folder / "model", folder / "out", changed, execution=again)
    liar_ext.compress(folder / "model", folder / "out", recipe(folder), execution=again)
    same = "model.safetensors"
    assert (folder / "out" / same).read_bytes() == (folder / "whole" / same).read_bytes()


def _names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "samples.safetensors", framework="pt") as stored:
        return list(stored.keys())


def test_the_plan_counts_hidden_states(folder, family):
    found = planning.plan(folder / "model", recipe(folder))
    report = liar_ext.compress(folder / "model", folder / "out", recipe(folder))
    assert found["calibration"]["tokens"] == report.calibration["tokens"]
    assert found["parameters"]["after"] == report.totals["parameters_after"]
    guessed = planning.plan(folder / "model", recipe(folder, calibration=None, samples=9))
    assert guessed["calibration"]["tokens"] == 9 * LENGTHS[family]


def test_what_is_read_waits_in_the_memory_of_the_plan(folder):
    wanted = recipe(folder)
    model = layout.empty_model(transformers.AutoConfig.from_pretrained(folder / "model"))
    batches = load_calibration(folder / "model", model, wanted).batches
    held = sum(t.nbytes for batch in batches for t in (batch.features or {}).values())
    tokens = tokens_of(folder / "model", model, wanted, complete=True, notes=[])
    assert features_bytes(model, adapter_for(model.config), tokens) == held > 0


def test_a_folder_of_images_is_prepared_by_the_models_own_processor(tmp_path):
    from PIL import Image

    model_of("vit").save_pretrained(tmp_path / "model")
    made = transformers.ViTImageProcessor(size={"height": 24, "width": 32})
    made.save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    for number in range(16):
        file = tmp_path / "images" / f"class-{number % 3}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 50, 3), np.uint8)).save(file)
    wanted = recipe(tmp_path, calibration=str(tmp_path / "images"))
    report = liar_ext.compress(tmp_path / "model", tmp_path / "out", wanted)
    assert report.calibration["samples"] == 14
    found = planning.plan(tmp_path / "model", wanted)
    assert found["calibration"]["tokens"] == 14 * 13
    assert found["loader"]["with"] == "transformers.AutoModelForImageClassification"
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    (tmp_path / "images" / "class-0" / "broken.png").write_text("no image")
    with pytest.raises(InputError, match="cannot be read as an image"):
        liar_ext.compress(
            tmp_path / "model",
            tmp_path / "more",
            recipe(tmp_path, calibration=str(tmp_path / "images"), samples=99),
        )


def test_a_folder_of_sounds_is_prepared_by_the_models_own_extractor(tmp_path):
    model_of("whisper").save_pretrained(tmp_path / "model")
    # 40 frames of 160 samples
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=8, chunk_length=1, sampling_rate=6400
    )
    extractor.save_pretrained(tmp_path / "model")
    (tmp_path / "sounds").mkdir()
    for number in range(14):
        _record(tmp_path / "sounds" / f"{number}.wav", 6400, number)
    wanted = recipe(tmp_path, calibration=str(tmp_path / "sounds"))
    report = liar_ext.compress(tmp_path / "model", tmp_path / "out", wanted)
    assert report.calibration["tokens"] == 14 * 20
    _record(tmp_path / "sounds" / "slow.wav", 8000, 0)
    with pytest.raises(InputError, match="8000 samples a second, the model takes 6400"):
        liar_ext.compress(
            tmp_path / "model",
            tmp_path / "more",
            recipe(tmp_path, calibration=str(tmp_path / "sounds"), samples=99),
        )


def _record(file: Path, rate: int, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 2000, rate // 2 * 2).astype(np.int16)
    with wave.open(str(file), "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(noise.tobytes())


def test_a_count_of_layers_under_both_its_names_is_changed_in_both(tmp_path):
    """Older releases of transformers wrote it twice."""
    model_of("whisper").save_pretrained(tmp_path / "model")
    save_file({"input_features": samples("whisper")}, tmp_path / "samples.safetensors")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    wanted = recipe(tmp_path, drop_layers=(1,), sparsity=0.25, target=("ffn",))
    liar_ext.compress(tmp_path / "model", tmp_path / "out", wanted)
    loaded = MODELS["whisper"][1].from_pretrained(tmp_path / "out")
    assert len(loaded.model.encoder.layers) == 2


def test_a_model_folder_runs_no_code(tmp_path, monkeypatch):
    """Nor does it get to ask for it."""
    model_of("vit").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "evil.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "evil.Processor"}})
    )
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    # the family's own processor is taken, and comes as far as the file
    with pytest.raises(InputError, match="cannot be read as an image"):
        liar_ext.compress(
            tmp_path / "model",
            tmp_path / "out",
            recipe(tmp_path, calibration=str(tmp_path / "images")),
        )


def test_a_decoder_alone_is_not_taken_for_the_encoder():
    config = transformers.WhisperConfig(**SMALL["whisper"])
    model = transformers.WhisperForCausalLM(config).eval()
    with pytest.raises(InputError, match=r"no whisper layers at encoder\.layers"):
        liar_ext.prune(model, [samples("whisper")], Recipe(target=("ffn",)))


def test_a_folder_as_transformers_writes_processors_now_is_taken(tmp_path):
    model_of("whisper").save_pretrained(tmp_path / "model")
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=8, chunk_length=1, sampling_rate=6400
    )
    stated = {"feature_extractor": extractor.to_dict(), "processor_class": "WhisperProcessor"}
    (tmp_path / "model" / "processor_config.json").write_text(json.dumps(stated))
    (tmp_path / "sounds").mkdir()
    for number in range(12):
        _record(tmp_path / "sounds" / f"{number}.wav", 6400, number)
    wanted = recipe(tmp_path, calibration=str(tmp_path / "sounds"))
    report = liar_ext.compress(tmp_path / "model", tmp_path / "out", wanted)
    assert report.calibration["samples"] == 12
    # cut in the middle of a sample
    whole = (tmp_path / "sounds" / "0.wav").read_bytes()
    (tmp_path / "sounds" / "0.wav").write_bytes(whole[:-3])
    liar_ext.compress(tmp_path / "model", tmp_path / "more", wanted)


@pytest.mark.parametrize("method", ["perplexity", "perplexity-greedy", "taylor"])
def test_a_plan_refuses_what_a_run_would(folder, method):
    wanted = recipe(folder, depth=method, drop=1, sparsity=0)
    with pytest.raises(InputError, match=f"--depth {method}: .* next token"):
        planning.plan(folder / "model", wanted)
    with pytest.raises(InputError, match="next token|no loss"):
        liar_ext.compress(folder / "model", folder / "out", wanted)


BAD = {
    "shape": (lambda v: v[..., 1:], r"are \(14, .*\) torch.float32; the model takes \(n, "),
    "integers": (lambda v: v.to(torch.int64), "floating point"),
    "not finite": (lambda v: v * torch.nan, "of sample 0 are NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_refused_with_what_the_model_takes(folder, family, name):
    change, message = BAD[name]
    save_file(
        {MODELS[family][2]: change(samples(family)).contiguous()}, folder / "samples.safetensors"
    )
    with pytest.raises(InputError, match=message):
        liar_ext.compress(folder / "model", folder / "out", recipe(folder))
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("missing.npy", "no such file or folder"),
        ("text.txt", "is no folder of"),
        ("other.safetensors", "has no tensor 'pixel_values' .found input_ids."),
        ("empty", "has no images"),
        ("ids.npy", "holds int64"),
    ],
)
def test_other_calibrations_are_refused(tmp_path, calibration, message):
    model_of("vit").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("A text.")
    (tmp_path / "empty").mkdir()
    save_file({"input_ids": torch.ones(2, 3)}, tmp_path / "other.safetensors")
    np.save(tmp_path / "ids.npy", np.ones((2, 3), np.int64))
    with pytest.raises(InputError, match=message):
        liar_ext.compress(
            tmp_path / "model",
            tmp_path / "out",
            recipe(tmp_path, calibration=str(tmp_path / calibration)),
        )


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "MODEL", "--text", "TEXT"],
        ["eval", "MODEL", "--stsb", "TEXT"],
        ["merge", "MODEL", "--out", "OUT", "--calibration", "TEXT", "--drop", "1"],
        ["replace", "MODEL", "--out", "OUT", "--train", "TEXT", "--steps", "1", "--drop", "1"],
        ["recover", "MODEL", "--out", "OUT", "--train", "TEXT", "--steps", "1"],
        ["grow", "MODEL", "--out", "OUT", "--layers", "1", "--train", "TEXT", "--steps", "1"],
        ["bench", "latency", "MODEL", "--out", "OUT"],
        ["trace", "MODEL"],
        ["compare", "MODEL", "--out", "OUT", "--eval", "text=TEXT", "--calibration", "TEXT"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
def test_commands_for_text_refuse_them_by_name(folder, family, capsys, command):
    (folder / "text.txt").write_text("A line of text.\n" * 50)
    known = {"MODEL": "model", "OUT": "out", "TEXT": "text.txt"}
    line = []
    for word in command:
        for key, own in known.items():
            word = word.replace(key, str(folder / own))
        line.append(word)
    assert main(line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert not (folder / "out").exists()
    why = (
        *(f"{family} reads", "only layers of decoders", "cannot be evaluated", "cannot be traced"),
        *("which is evaluated with", "no next token"),
    )
    assert any(reason in said for reason in why), said
