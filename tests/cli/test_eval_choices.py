"""Multiple choice and stability on the command line: pruned layouts, warnings, refusals, grids."""

from __future__ import annotations

import json

import pytest
from liar_choices import RECORDS, write_jsonl
from liar_depth import build

from liar_ext.cli import main

SIZES = ["--samples", "32", "--seq-len", "32", "--sparsity", "0.5"]
LONG = "the list returns a value of the object and the string is new to the map with a key"


@pytest.fixture
def questions(tmp_path):
    other = {"context": LONG, "choices": ["open file", "key is", "dict"], "answer": 2}
    return write_jsonl(tmp_path / "questions.jsonl", RECORDS["plain"], other)


def _json(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def _error(arguments, capsys) -> str:
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    return line


def test_widths_of_their_own_are_evaluated_too(inputs, questions, tmp_path, capsys):
    out = str(tmp_path / "small")
    place = ["--out", out, "--calibration", str(inputs.text), "--allocation", "influence"]
    assert main(["prune", str(inputs.llama), *place, *SIZES]) == 0
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model_type"] == "liar_ext"
    capsys.readouterr()
    assert main(["eval", out, "--choices", questions, "--json"]) == 0
    result = _json(capsys)
    assert (result["metric"], result["items"], result["format"]) == ("accuracy", 2, "plain")
    assert result["value"] == result["accuracy"] in (0, 50, 100)
    assert result["chance"] == pytest.approx(100 / 3)
    arguments = ["eval", out, "--stability", questions, "--dense", str(inputs.llama), "--json"]
    assert main(arguments) == 0
    assert 0 <= _json(capsys)["value"] <= 100


def test_a_decoder_without_an_adapter_is_evaluated_as_any(inputs, questions, tmp_path, capsys):
    build("gptj").save_pretrained(tmp_path / "dense")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "dense" / file).write_bytes((inputs.llama / file).read_bytes())
    dense, out = str(tmp_path / "dense"), str(tmp_path / "small")
    assert main(["prune", dense, "--out", out, "--drop-layers", "1-3"]) == 0
    capsys.readouterr()
    for given in (["--choices", questions], ["--stability", questions, "--dense", dense]):
        assert main(["eval", out, *given, "--json"]) == 0
        assert 0 <= _json(capsys)["value"] <= 100
    assert main(["eval", out, "--text", str(inputs.other), "--json"]) == 0
    assert _json(capsys)["seq_len"] == 64


def test_the_report_shows_what_eval_prints(inputs, questions, tmp_path, capsys):
    out = str(tmp_path / "small")
    place = ["--out", out, "--calibration", str(inputs.text)]
    assert main(["prune", str(inputs.llama), *place, *SIZES]) == 0
    files = []
    for given in (
        ["--choices", questions],
        ["--stability", questions, "--dense", str(inputs.llama)],
    ):
        capsys.readouterr()
        assert main(["eval", out, *given, "--json"]) == 0
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(capsys.readouterr().out)
    assert main(["report", out, *(f"--evaluation={file}" for file in files)]) == 0
    page = (tmp_path / "small" / "report.html").read_text()
    assert "accuracy on" in page and "stability on" in page


def test_the_printed_lines_have_all_three_accuracies(inputs, questions, capsys):
    assert main(["eval", str(inputs.llama), "--choices", questions]) == 0
    out = capsys.readouterr().out
    for label in ("accuracy, %", "accuracy by length, %", "accuracy by text loss, %"):
        assert label in out
    assert "chance 33.3333; 2 plain items; 95 % Wilson score over questions" in out


@pytest.mark.parametrize("options", [["--choices"], ["--dense", "{llama}", "--stability"]])
def test_a_set_whose_texts_were_calibrated_on_is_warned_of(
    inputs, questions, tmp_path, capsys, options
):
    calibration, out = tmp_path / "calibration.txt", str(tmp_path / "small")
    for text, warned in ((inputs.text.read_text(), False), (f"{LONG}\n" * 200, True)):
        calibration.write_text(text)
        place = ["--out", out, "--calibration", str(calibration), "--reconstruct", "none"]
        assert main(["prune", str(inputs.llama), *place, *SIZES, "--overwrite"]) == 0
        capsys.readouterr()
        given = [option.format(llama=inputs.llama) for option in options]
        assert main(["eval", out, *given, questions, "--json"]) == 0
        assert ("warning: about 100 % of the calibration" in capsys.readouterr().err) is warned


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{bert}", "--choices", "{file}"], "a bert model is evaluated with --stsb"),
        (["{llama}", "--stsb", "{stsb}"], "is evaluated with --text, --choices or"),
        (["{llama}", "--choices", "{stsb}"], "cannot read a .csv file; give .jsonl"),
        (["{llama}", "--choices", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["{llama}", "--choices", "{file}", "--choices", "{file}"], "is given twice"),
        (["{llama}", "--stability", "{file}"], "--stability and --dense go together"),
        (
            ["{llama}", "--dense", "{llama}", "--stability", "{file}", "{file}"],
            "questions.jsonl: is given twice",
        ),
        (["{bert}", "--dense", "{llama}", "--stability", "{file}"], "bert model has no stability"),
        (["{llama}", "--dense", "{bert}", "--stability", "{file}"], "bert model has no stability"),
        (["{llama}", "--dense", "no/such/folder", "--stability", "{file}"], "no/such/folder"),
        (
            ["{llama}", "--choices", "{file}", "--dense", "{llama}", "--stability", "{file}"],
            "not allowed with",
        ),
        (["{llama}", "--choices", "{file}", "--seq-len", "1"], "and the window only 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_evaluated_is_one_line(inputs, questions, capsys, arguments, says):
    places = {name: str(getattr(inputs, name)) for name in ("llama", "bert", "text", "stsb")}
    filled = [argument.format(file=questions, **places) for argument in arguments]
    assert says in _error(["eval", *filled], capsys)


def test_a_grid_gives_the_accuracies_of_eval(inputs, questions, tmp_path, capsys):
    out = tmp_path / "grid"
    fixed = ["--samples", "24", "--seq-len", "32", "--batch-size", "4", "--sparsities", "0.25,0.5"]
    measured = ["--eval", f"choices={questions}", "--eval", f"text={inputs.other}"]
    place = ["--out", str(out), "--calibration", str(inputs.text)]
    arguments = ["compare", str(inputs.llama), *place, *fixed, *measured]
    assert main([*arguments, "--eval-windows", "4"]) == 0
    result = json.loads((out / "comparison.json").read_text())
    name = f"choices={questions}"
    assert result["evaluations"][name]["higher"] is True
    assert result["evaluations"][name]["seq_len"] == 64, "what the model takes"
    page = (out / "comparison.md").read_text()
    assert "accuracy, % on questions.jsonl (higher is better)" in page
    for number, cell in enumerate(result["cells"]):
        recipe, folder = tmp_path / f"{number}.json", str(tmp_path / str(number))
        recipe.write_text(json.dumps(cell["recipe"]))
        prune = ["prune", str(inputs.llama), "--out", folder, "--recipe", str(recipe)]
        assert main(prune) == 0
        capsys.readouterr()
        assert main(["eval", folder, "--choices", questions, "--json"]) == 0
        found, own = _json(capsys), cell["metrics"][name]
        assert {key: own[key] for key in own if key != "seconds"} == {
            key: found[key] for key in own if key != "seconds"
        }
