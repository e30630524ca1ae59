"""Layers inserted from file to file: what is in them, what stays, and nothing half done."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from liar_depth import MODELS, build
from liar_families import FAMILIES, outputs, probe_tokens, tree_hash, write_tokens
from safetensors.torch import load_file, save_file

import liar_ext
from liar_ext import InputError
from liar_ext.cli import main
from liar_ext.depth import surgery
from liar_ext.depth.grow import PREDICTORS, Growth, grow
from liar_ext.depth.grow.basis import basis_reference
from liar_ext.depth.grow.mlp import MlpOptions
from liar_ext.depth.grow.placement import default_gaps
from liar_ext.depth.grow.predictors import Predictor
from liar_ext.depth.grow.ridge import ridge_reference
from liar_ext.depth.grow.write import Places, check_learnable
from liar_ext.depth.surgery import layer_list

# by the layer below: Qwen3 has windows from layer 3 on, Gemma 3 none in layers 2 and 5
GAPS = dict.fromkeys(MODELS, (1, 3)) | {"gemma3": (0, 3), "smollm3": (0, 2)}
QUICK = MlpOptions(epochs=1, norm_weight=5e-5)


class Below:
    """Predicts the coefficients of the layer below, unchanged."""

    def __init__(self):
        self.facts = {}

    def __call__(self, below, above):
        return below


def saved(tmp_path, name, dtype=torch.float32, **options):
    model = build(name).to(dtype)
    model.save_pretrained(tmp_path / "dense", **options)
    return model


def grown(tmp_path, gaps, predictor, out="out", **fields):
    growth = Growth(gaps, predictor=predictor, options=QUICK, **fields)
    return grow(tmp_path / "dense", tmp_path / out, growth)


def stock(folder, name):
    """As transformers loads it, which must find everything in its place."""
    model_class = getattr(transformers, MODELS[name][0])
    loaded, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), "nothing new, missing or left over"
    return loaded.eval()


def doubled(gaps, count=6):
    return [layer for i in range(count) for layer in ([i, i] if i in gaps else [i])]


def layers_of(model):
    return [dict(layer.named_parameters()) for layer in layer_list(model)[1]]


@pytest.mark.parametrize("name", MODELS)
def test_copy_is_duplication_bit_for_bit(tmp_path, name):
    """In several shards, of which one starts inside a layer."""
    model = saved(tmp_path, name, max_shard_size="20KB")
    before = tree_hash(tmp_path / "dense")
    report = grown(tmp_path, GAPS[name], "copy")
    assert tree_hash(tmp_path / "dense") == before
    expected = surgery(model, doubled(GAPS[name]))
    loaded = stock(tmp_path / "out", name)
    for key, value in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(outputs(loaded), outputs(expected))
    assert report["layers"]["inserted"] == [GAPS[name][0] + 1, GAPS[name][1] + 2]
    assert report["totals"]["parameters_after"] == sum(p.numel() for p in expected.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_layers_that_were_there_stay_and_new_ones_are_between_them(tmp_path, name):
    model = saved(tmp_path, name)
    grown(tmp_path, GAPS[name], "mlp")
    loaded = stock(tmp_path / "out", name)
    dense, deep = layers_of(model), layers_of(loaded)
    kept = doubled(GAPS[name])
    for at, source in enumerate(kept):
        new = at > 0 and kept[at - 1] == source
        for part, value in deep[at].items():
            below = dense[source][part]
            if not new:
                assert torch.equal(value, below), part
            elif value.dim() < 2:
                # neither the first layer's, as in the repository, nor one neighbour's
                mean = (below.double() + dense[source + 1][part].double()) / 2
                assert torch.equal(value, mean.float()), part
            else:
                assert not torch.equal(value, below) and bool(value.any()), part
    if name != "gptj":
        assert torch.equal(outputs(liar_ext.load(tmp_path / "out")), outputs(loaded))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(stock(tmp_path / "again", name)), outputs(loaded))


@pytest.mark.parametrize("name", [n for n in MODELS if n != "bert"])
def test_generation_is_the_same_with_a_cache(tmp_path, name):
    saved(tmp_path, name)
    grown(tmp_path, GAPS[name], "mlp")
    model = stock(tmp_path / "out", name)
    ids = probe_tokens(batch=2, length=12)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        fast = model.generate(ids, use_cache=True, **options)
        slow = model.generate(ids, use_cache=False, **options)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3-windows"])
def test_ridge_by_the_definitions(tmp_path, name):
    """The SVD of all layers and least squares, of (out, in); GPT-2 stores (in, out)."""
    model = saved(tmp_path, name)
    (gap, _) = GAPS[name]
    report = grown(tmp_path, (gap,), "ridge")
    dense, new = layers_of(model), layers_of(stock(tmp_path / "out", name))[gap + 1]
    told = {entry["name"]: entry for entry in report["growth"]["matrices"]}
    assert told.keys() == {part for part, value in new.items() if value.dim() == 2}
    for part, entry in told.items():
        found = [layer[part].detach().double() for layer in dense]
        turned = name == "gpt2"
        basis, v = basis_reference([matrix.T if turned else matrix for matrix in found])
        given = torch.cat([torch.cat((v[i - 1], v[i + 1]), 1) for i in range(1, 5)])
        weights = ridge_reference(given, torch.cat(list(v[1:5])), entry["ridge"])
        expected = basis.matrix(torch.cat((v[gap], v[gap + 1]), 1) @ weights)
        value = new[part].double()
        beside = (found[gap].norm() + found[gap + 1].norm()) / 2
        assert entry["norms"][str(gap)] == pytest.approx(float(expected.norm() / beside), 1e-4)
        # what is small because it cannot be predicted gets the size of its neighbours
        expected *= beside / expected.norm()
        torch.testing.assert_close(value.T if turned else value, expected, rtol=1e-4, atol=1e-5)
        assert entry["rank"] == basis.rank


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_coefficients_that_are_not_changed_are_duplication_to_rounding(tmp_path, monkeypatch, name):
    monkeypatch.setitem(PREDICTORS, "mlp", Predictor("mlp", "", lambda *_: Below()))
    model = saved(tmp_path, name)
    grow(tmp_path / "dense", tmp_path / "out", Growth((2,)))
    new = layers_of(stock(tmp_path / "out", name))[3]
    for part, value in new.items():
        if value.dim() == 2:
            torch.testing.assert_close(value, layers_of(model)[2][part], rtol=0, atol=1e-6)


def test_average_is_the_mean(tmp_path):
    model = saved(tmp_path, "llama", torch.bfloat16)
    grown(tmp_path, (2,), "average")
    new = layers_of(stock(tmp_path / "out", "llama"))[3]
    dense = layers_of(model)
    for part, value in new.items():
        mean = (dense[2][part].double() + dense[3][part].double()) / 2
        assert torch.equal(value, mean.bfloat16())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt", "qwen3-windows", "gemma3"])
def test_identity_computes_what_the_dense_model_does(tmp_path, name):
    model = saved(tmp_path, name)
    # between layers of one kind; what Gemma's layers say is normed before it is added
    gaps = (0, 3) if name == "gemma3" else (0, 1, 4)
    grown(tmp_path, gaps, "identity")
    loaded = stock(tmp_path / "out", name)
    assert len(layers_of(loaded)) == 6 + len(gaps)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bert", r"this bert model has norms behind its attention and FFN \(post-norm\)"),
        ("bloom", "this bloom model has attention whose heads are no Site"),
    ],
)
def test_identity_is_refused_where_it_would_not_be(tmp_path, name, words):
    saved(tmp_path, name)
    with pytest.raises(InputError, match=words):
        grown(tmp_path, (3,), "identity")
    assert not (tmp_path / "out").exists()


def test_the_same_seed_makes_the_same_files_whatever_else_is_grown(tmp_path):
    saved(tmp_path, "llama")
    for out, gaps, seed in (("a", (1, 3), 0), ("b", (1, 3), 0), ("c", (1, 3), 1), ("d", (3,), 0)):
        grown(tmp_path, gaps, "mlp", out, seed=seed)
    weights = {out: load_file(tmp_path / out / "model.safetensors") for out in "abcd"}
    assert (
        tree_hash(tmp_path / "a")["model.safetensors"]
        == (tree_hash(tmp_path / "b")["model.safetensors"])
    )
    part = "self_attn.q_proj.weight"
    assert not torch.equal(
        weights["c"][f"model.layers.5.{part}"], weights["a"][f"model.layers.5.{part}"]
    )
    assert torch.equal(
        weights["d"][f"model.layers.4.{part}"], weights["a"][f"model.layers.5.{part}"]
    )


def test_widths_of_their_own_stay_and_only_equal_neighbours_have_a_gap(tmp_path):
    """Of four layers 0 and 2 are narrow, so that no gap has two alike; then 2 and 3."""
    model = build("llama")
    config = model.config.to_dict() | {"num_hidden_layers": 4}
    surgery(model, [0, 1, 2, 3]).save_pretrained(tmp_path / "four")
    for name, narrow in (("alternating", (0, 2)), ("half", (2, 3))):
        folder = tmp_path / name
        tensors = load_file(tmp_path / "four" / "model.safetensors")
        for layer in narrow:
            for part in ("gate_proj", "up_proj"):
                key = f"model.layers.{layer}.mlp.{part}.weight"
                tensors[key] = tensors[key][:20].contiguous()
            key = f"model.layers.{layer}.mlp.down_proj.weight"
            tensors[key] = tensors[key][:, :20].contiguous()
        widths = [{"heads": 2, "ffn": 20 if i in narrow else 48} for i in range(4)]
        key = {"version": 1, "base_model_type": "llama", "layers": widths, "added_biases": []}
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        data = config | {"model_type": "liar_ext", "liar_ext": key}
        (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"layers 1 and 2 differ in the shape of mlp.down_proj"):
        grow(tmp_path / "alternating", tmp_path / "out", Growth((1,), predictor="average"))
    with pytest.raises(InputError, match="no three in a row; use average, copy or identity"):
        grow(tmp_path / "half", tmp_path / "out", Growth((2,)))
    grow(tmp_path / "half", tmp_path / "out", Growth((2,), predictor="copy"))
    found = liar_ext.load(tmp_path / "out")
    assert [layer.mlp.down_proj.in_features for layer in found.model.layers] == [48, 48, 20, 20, 20]
    expected = surgery(liar_ext.load(tmp_path / "half"), [0, 1, 2, 2, 3])
    assert torch.equal(outputs(found), outputs(expected))


def test_a_matrix_that_is_zero_everywhere_stays_zero(tmp_path):
    model = build("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "dense")
    report = grown(tmp_path, (2,), "mlp")
    (entry,) = [e for e in report["growth"]["matrices"] if e["name"] == "mlp.up_proj.weight"]
    assert (entry["rank"], entry["norms"]) == (0, {"2": 0.0})
    assert not stock(tmp_path / "out", "llama").model.layers[3].mlp.up_proj.weight.any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_float64_checkpoint_is_predicted_in_float64(tmp_path, monkeypatch, name):
    monkeypatch.setitem(PREDICTORS, "mlp", Predictor("mlp", "", lambda *_: Below()))
    model = saved(tmp_path, name, torch.float64)
    grow(tmp_path / "dense", tmp_path / "out", Growth((2,)))
    new = layers_of(liar_ext.load(tmp_path / "out"))[3]
    for part, value in new.items():
        if value.dim() == 2:
            torch.testing.assert_close(value, layers_of(model)[2][part], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("count", "added", "gaps"),
    [(32, 16, range(15, 31)), (5, 2, (2, 3)), (5, 4, (0, 1, 2, 3)), (2, 1, (0,))],
)
def test_the_default_is_the_last_gaps(count, added, gaps):
    assert default_gaps(count, added) == tuple(gaps)


def test_the_command_line(tmp_path, capsys):
    saved(tmp_path, "llama")
    out = str(tmp_path / "out")
    command = ["grow", str(tmp_path / "dense"), "--out", out]
    assert main([*command, "--layers", "2", "--epochs", "1"]) == 0
    assert "layers 6 -> 8" in capsys.readouterr().out
    assert main([*command, "--layers", "2"]) == 2
    assert "exists; give another folder or --overwrite" in capsys.readouterr().err
    options = ["--insert", "1,3-4", "--predictor", "ridge", "--overwrite", "--json"]
    assert main([*command, *options]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert data["layers"]["inserted_after"] == [1, 3, 4]
    report = json.loads((tmp_path / "out" / "liar_report.json").read_text())
    assert report["kind"] == "layers"
    assert report["growth"]["predictor"] == "ridge"
    words = (tmp_path / "out" / "README.md").read_text()
    assert "behind each of layers 1, 3, 4, counted from 0 in the source" in words
    assert "were not trained" in words
    assert main(["report", out]) == 0
    assert "written: " in capsys.readouterr().out
    # and it is a checkpoint like any other
    write_tokens(tmp_path / "tokens.npy")
    recipe = liar_ext.Recipe(
        sparsity=0.5, calibration=str(tmp_path / "tokens.npy"), seq_len=24, samples=24
    )
    liar_ext.compress(out, tmp_path / "narrow", recipe)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "narrow")
    assert (config.num_hidden_layers, config.intermediate_size) == (9, 24)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--insert", "5"],
            "--insert 5: there is no layer on both sides; the gaps of 6 layers, by",
        ),
        (["--insert", "9"], "the gaps of 6 layers, by the layer below: 0 to 4"),
        (["--insert", "x"], "--insert x: must be layers from 0"),
        (["--insert", "1,1"], "--insert 1,1: names a layer twice"),
        (["--layers", "6"], "--layers 6: 6 layers have 5 gaps, and each takes one layer; give 1"),
        (["--layers", "0"], "--layers 0"),
        (["--layers", "1", "--insert", "2"], "not allowed with"),
        ([], "one of the arguments --insert --layers is required"),
        (["--layers", "1", "--predictor", "svd"], "mlp, ridge, average, copy, identity"),
        (["--layers", "1", "--hyper-parameters", "x"], "choose from paper, code"),
        (["--layers", "1", "--epochs", "0"], "--epochs 0: must be at least 1"),
        (
            ["--layers", "1", "--epochs", "2", "--predictor", "copy"],
            "--epochs: is of --predictor mlp",
        ),
        (["--layers", "1", "--device", "tpu"], "--device tpu: choose from"),
        (["--layers", "1", "--resume"], "--resume goes on with a training; give --train"),
        (["--layers", "1", "--steps", "3"], "--steps: is of a training; give --train"),
        (["--layers", "1", "--train", "a.txt"], "--train: for how long? give --steps"),
        (["--layers", "1", "--train", "a.txt", "--steps", "0"], "--steps 0: must be at least 1"),
        (["--layers", "1", "--train", "a.txt", "--steps", "2"], "a.txt: no such file or folder"),
        (["--layers", "1", "--train", "a.txt", "--steps", "2", "--lr", "nan"], "--lr nan: must"),
        (["--layers", "1", "--train", "a.txt", "--steps", "2", "--seq-len", "1"], "--seq-len 1"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, capsys, options, words):
    saved(tmp_path, "llama")
    try:
        code = main(["grow", str(tmp_path / "dense"), "--out", str(tmp_path / "out"), *options])
    except SystemExit as exit_:
        code = exit_.code
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert code == 2
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_neighbours_of_two_kinds_are_named(tmp_path):
    saved(tmp_path, "qwen3-windows")
    words = (
        r"--insert 2: layers 2 and 3 differ in layer_types \(full_attention, sliding_attention\).*"
        "one kind: 0, 1, 3, 4"
    )
    with pytest.raises(InputError, match=words):
        grown(tmp_path, (2,), "copy")


@pytest.mark.parametrize(("count", "predictor"), [(1, "mlp"), (2, "mlp"), (2, "ridge")])
def test_too_few_layers_to_learn_from(tmp_path, count, predictor):
    surgery(build("llama"), list(range(count))).save_pretrained(tmp_path / "dense")
    words = "there is no layer on both sides" if count == 1 else "learns from three layers in a row"
    with pytest.raises(InputError, match=words):
        grown(tmp_path, (0,), predictor)
    assert not (tmp_path / "out").exists()
    if count == 2:
        grown(tmp_path, (0,), "average")


def test_three_layers_are_enough(tmp_path):
    surgery(build("llama"), [0, 1, 2]).save_pretrained(tmp_path / "dense")
    for predictor in ("mlp", "ridge"):
        grown(tmp_path, (0, 1), predictor, predictor)
        assert torch.isfinite(outputs(liar_ext.load(tmp_path / predictor))).all()


def test_damaged_weights_are_named(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[4].mlp.up_proj.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    # as the source has it: in the result it is layer 5
    words = r"model.layers.4.mlp.up_proj.weight: has NaN or infinite weights"
    for predictor, gap in (("ridge", 1), ("average", 3)):
        with pytest.raises(InputError, match=words):
            grown(tmp_path, (gap,), predictor)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_layers_of_two_kinds_have_parts_of_their_own():
    """As of a hybrid: attention in layers 0 to 2, something else in 3 to 5."""
    attention = [torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6)}) for _ in range(3)]
    others = [torch.nn.ModuleDict({"mix": torch.nn.Linear(4, 4, bias=False)}) for _ in range(3)]
    layers = torch.nn.ModuleList([*attention, *others])
    found = Places("layers", layers, [0, 0, 1, 2, 3, 3, 4, 5], {0: 1, 3: 5})
    assert [matrix.name for matrix in found.matrices()] == ["q.weight", "mix.weight"]
    assert found.vectors() == ["q.bias"]
    assert found.gaps_with("mix.weight") == [3]
    assert found.parameters() == ["layers.1.q.weight", "layers.1.q.bias", "layers.5.mix.weight"]
    check_learnable(found, PREDICTORS["mlp"])


def test_a_mixture_of_experts_is_refused(tmp_path):
    config = transformers.Qwen3MoeConfig(
        **{k: v for k, v in MODELS["llama"][1].items() if k != "intermediate_size"},
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match=r"experts.* has shape .*: only layers of matrices"):
        grown(tmp_path, (1,), "average")
    assert not (tmp_path / "out").exists()


def test_an_encoder_can_be_grown(tmp_path):
    saved(tmp_path, "bert")
    grown(tmp_path, (4,), "ridge")
    model = stock(tmp_path / "out", "bert")
    assert model.config.num_hidden_layers == 7
    assert torch.isfinite(outputs(model)).all()


# T5's first layer has a table of position biases that no other has, and no layer goes beside it
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "t5-encoder"])
def test_families_of_two_layers_are_averaged(tmp_path, name):
    """All that have an adapter: biases, head sizes, nested configs; windows in one layer of two."""
    FAMILIES[name].build().save_pretrained(tmp_path / "dense")
    if name.endswith("-mixed"):
        with pytest.raises(InputError, match=r"differ in (layer_types|no_rope_layers)"):
            grown(tmp_path, (0,), "average")
        return
    grown(tmp_path, (0,), "average")
    model = liar_ext.load(tmp_path / "out")
    assert len(layers_of(model)) == 3
    assert torch.isfinite(outputs(model)).all()
    loaded = FAMILIES[name].auto.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(loaded), outputs(model))
