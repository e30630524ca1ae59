"""The page of every kind of folder that liar-ext writes, as its commands write them."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest
import yaml
from liar_chromium import chromium, needs_chromium
from liar_images import resnet, write_pictures
from liar_page import Page

from liar_ext.cli import main
from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
from liar_ext.report import html
from liar_ext.report.commands import repeat
from liar_ext.report.outputs import read

TEXT = ["--calibration", "calibration.txt", "--seq-len", "64"]
TRAIN = ["--train", "calibration.txt", "--steps", "2", "--seq-len", "32", "--held-out", "8"]
FUSE = ["--images", "images.npz", "--time", "1", "--largest-kernel", "3", "--repeats", "1"]
# name -> a command without its --out; in this order, for some start from others
MADE = {
    "pruned": ["prune", "model", "--sparsity", "0.5", "--target", "ffn,heads", "--samples", "40",
               *TEXT, "--ridge", "1e-3", "--bias", "never"],
    "ranked": ["prune", "model", "--sparsity", "0.3", "--samples", "40", *TEXT,
               "--allocation", "levels", "--empty", "--round-to", "8"],
    "depth": ["prune", "model", "--depth", "streamline", "--drop", "1", "--samples", "40", *TEXT],
    "dropped": ["prune", "model", "--drop-layers", "1,3"],
    "merged": ["merge", "model", "--drop", "1", "--combine", "2", *TEXT],
    "grown": ["grow", "model", "--insert", "1,3", "--predictor", "average", *TRAIN],
    "replaced": ["replace", "model", "--window", "2-3", "--accumulation", "1", *TRAIN],
    "recovered": ["recover", "pruned", "--last", "1", "--no-head", *TRAIN],
    "adapted": ["recover", "pruned", "--method", "lora", "--rank", "2", *TRAIN],
    "fused": ["fuse", "resnet", *FUSE, "--top", "1", "--patches", "2048", "--batch-size", "16"],
}  # fmt: skip
# what is the same in every run; what is chosen by a clock is not
REPEATABLE = [name for name in MADE if name != "fused"]
SERVE = {
    "benchmark": "serve",
    "device": "a device",
    "versions": {"torch": "2.13.0"},
    "entries": [
        {
            "name": "dense",
            "path": "model",
            "kind": "decoder",
            "mode": "eager",
            "dtype": "float32",
            "batch": 1,
            "prompt": 128,
            "new_tokens": 64,
            "prefill_s": {"p20": 0.011, "p50": 0.012, "p80": 0.013},
            "decode_s": {"p20": 0.004, "p50": 0.005, "p80": 0.006},
            "tokens_per_s": 200.0,
            "peak_memory_bytes": 3 << 30,
            "file_bytes": 5 << 20,
            "load_s": 0.5,
            "parameters": 2_816_064,
        },
        {
            "name": "small",
            "path": "pruned",
            "kind": "decoder",
            "mode": "eager",
            "dtype": "float32",
            "batch": 1,
            "prompt": 128,
            "new_tokens": 64,
            "tokens_per_s": 250.0,
            "speedup": {"decode": 1.25},
        },
        {"name": "bare", "prefill_s": None},
    ],
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with every kind of output, and the inputs under the names that commands give."""
    root = tmp_path_factory.mktemp("made")
    (root / "model").symlink_to(MODEL)
    (root / "calibration.txt").symlink_to(CALIBRATION)
    (root / "heldout.txt").symlink_to(HELDOUT)
    resnet(depths=[1, 2]).save_pretrained(root / "resnet")
    write_pictures(root / "images.npz")
    (root / "serve.json").write_text(json.dumps(SERVE))
    with contextlib.chdir(root):
        for name, command in MADE.items():
            assert main([*command, "--out", name]) == 0, name
    return root


def _page(made: Path, *folders: str, **options) -> str:
    with contextlib.chdir(made):
        return html.render(read(folders), **options)


@pytest.mark.parametrize("name", MADE)
def test_every_kind_of_output_has_a_page(made, name):
    text = _page(made, name)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.count("svg") == page.count("figcaption")
    assert page.count("caption") == page.count("table")
    # its own parameters, whatever the command was
    totals = json.loads((made / name / "liar_report.json").read_text())["totals"]
    millions = totals["parameters_after"] / 1e6
    shown = f"{millions:.3g} M" if millions >= 0.01 else f"{totals['parameters_after']:,}"
    assert shown in page.text
    assert "/" + str(made).strip("/") not in text, "a folder of this machine is on the page"


@pytest.mark.parametrize("name", MADE)
def test_every_kind_of_output_has_a_card_for_the_hub(made, name):
    card = (made / name / "README.md").read_text()
    assert card.startswith("---\n")
    _, front, body = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert body.startswith("\n# ")
    assert {"liar-ext", "resnet" if name == "fused" else "llama"} <= set(found["tags"])
    assert len(found["tags"]) > 2, "what was done is a tag"
    own = "liar_ext" in json.loads((made / name / "config.json").read_text())
    assert found["library_name"] == ("liar-ext" if own else "transformers")
    assert own or found["pipeline_tag"] == "text-generation"
    # they were made from a folder of this machine
    assert "base_model" not in found


def test_several_outputs_stand_side_by_side(made):
    page = Page(_page(made, *MADE))
    assert len(page.ids) == len(set(page.ids))
    rows = [text for text in page.text if text in MADE]
    assert set(rows) == set(MADE)


@pytest.mark.parametrize("name", REPEATABLE)
def test_the_command_on_the_page_makes_the_same_files(made, tmp_path, name):
    (command,) = (repeat(output) for output in read([made / name]))
    words = shlex.split(command.replace("\\\n", ""))
    assert words[0] == "liar"
    for given in ("model", "calibration.txt", "pruned"):
        if given != name:
            (tmp_path / given).symlink_to(made / given)
    with contextlib.chdir(tmp_path):
        assert main(words[1:]) == 0
    for file in (made / name).glob("*.safetensors"):
        assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


def test_the_command_of_a_network_can_be_given(made, tmp_path):
    (command,) = (repeat(output) for output in read([made / "fused"]))
    words = shlex.split(command.replace("\\\n", ""))
    for given in ("resnet", "images.npz"):
        (tmp_path / given).symlink_to(made / given)
    with contextlib.chdir(tmp_path):
        assert main(words[1:]) == 0
    settings = [
        json.loads((folder / "fused" / "liar_report.json").read_text())["settings"]
        for folder in (made, tmp_path)
    ]
    assert settings[0] == settings[1]


@pytest.fixture(scope="session")
def full(made):
    """A page with everything that there is, made by the command."""
    evaluated = []
    with contextlib.chdir(made), contextlib.redirect_stdout(open("eval.txt", "w")) as out:
        for name in ("model", "pruned", "ranked"):
            options = ["--text", "heldout.txt", "--seq-len", "64", "--windows", "8", "--json"]
            out.truncate(0), out.seek(0)
            assert main(["eval", name, *options]) == 0
            out.flush()
            evaluated.append(made / f"{name}.json")
            evaluated[-1].write_text(Path("eval.txt").read_text().strip("\0"))
        grid = ["--sparsities", "0.3,0.5", "--reconstructions", "none,liar", *TEXT]
        grid += ["--samples", "40", "--eval", "text=heldout.txt", "--eval-windows", "4"]
        assert main(["compare", "model", "--out", "grid", "--eval-seq-len", "64", *grid]) == 0
        options = ["--serve", "serve.json", "--compare", "grid", "--out", "page.html"]
        options += ["--prompt", "Return a new list", "--new-tokens", "8"]
        options += [f"--eval={file}" for file in evaluated]
        assert main(["report", "pruned", "ranked", *options]) == 0
    return made / "page.html"


def test_what_was_measured_is_on_the_page(full):
    text = full.read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    titles = [re.sub("<.*?>", "", title) for title in re.findall("<h2.*?</h2>", text)]
    assert titles == [
        "Side by side",
        "Quality",
        "Methods compared",
        "Speed and memory",
        "What they say",
        "What was done",
        "What is not known here",
        "How to repeat it",
    ]
    # two outputs with an evaluation each: against their size
    assert "parameters removed from the whole model" in text
    assert "prefill" in text and "12 ms (11 ms to 13 ms)" in page.text
    assert "model (dense)" in page.text
    # what is measured is not said to be missing
    missing = text.partition('id="missing"')[2]
    assert "bench serve" not in missing and "--prompt" not in missing


def test_the_cards_at_the_top_compare_with_the_dense_model(made, full):
    options = ["--serve", "serve.json", "--eval=model.json", "--eval=pruned.json"]
    with contextlib.chdir(made):
        assert main(["report", "pruned", *options, "--out", "one.html"]) == 0
    cards = (made / "one.html").read_text().partition("</dl>")[0]
    dense = json.loads((made / "model.json").read_text())["value"]
    assert f"{dense:.4g} dense, +" in cards
    assert "1.25 times as fast" in cards


def test_what_is_missing_is_asked_for_as_the_kind_of_model_is_measured(made):
    assert "liar eval pruned --text FILE.txt" in _page(made, "pruned")
    # a network has its accuracy and its time in its report
    page = _page(made, "fused")
    assert "liar eval" not in page and "liar bench" not in page and "--prompt" not in page


@pytest.fixture
def apart(made, tmp_path):
    """Two outputs of one name in folders of their own; the model and the texts beside them."""
    for name in ("model", "heldout.txt", "model.json", "serve.json"):
        (tmp_path / name).symlink_to(made / name)
    for name in ("pruned", "ranked"):
        shutil.copytree(made / name, tmp_path / name / "small")
        path = tmp_path / name / "small" / "liar_report.json"
        report = {**json.loads(path.read_text()), "source": str(tmp_path / "model")}
        path.write_text(json.dumps(report))
    (tmp_path / "deeper").mkdir()
    return tmp_path


def _suggested(page: str) -> list[list[str]]:
    """The words of every command in the section about what is missing."""
    section = page.partition('id="missing"')[2].partition('id="repeat"')[0]
    blocks = re.findall("<code>(.*?)</code>", section, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in unescape(block).splitlines()]


def test_suggested_commands_run_where_the_page_is_made(apart, full, capsys):
    # one as the user may type it, one as a script may
    folders = ["pruned/small", str(apart / "ranked" / "small")]
    evaluated = json.loads((full.parent / "model.json").read_text())
    (apart / "dense.json").write_text(
        json.dumps({**evaluated, "dataset": str(apart / "heldout.txt"), "kind": "text"})
    )
    with contextlib.chdir(apart):
        assert main(["report", *folders, "--eval", "dense.json", "--out", "page.html"]) == 0
        page = (apart / "page.html").read_text()
        assert str(apart) not in page
        both = ["pruned/small", "ranked/small"]
        commands = _suggested(page)
        served = ["liar", "bench", "serve", "model", *both, "--json", "serve.json"]
        assert served in commands
        assert all(Path(word).is_dir() for word in served[3:6])
        for number, folder in enumerate(both, 1):
            text = ["--text", "heldout.txt", "--json", ">", f"eval-{number}.json"]
            assert ["liar", "eval", folder, *text] in commands
            evaluation = ["eval", folder, "--text", "heldout.txt", "--windows", "2"]
            capsys.readouterr()
            assert main([*evaluation, "--seq-len", "64", "--json"]) == 0
            Path(f"eval-{number}.json").write_text(capsys.readouterr().out.splitlines()[-1])
        reports = [words[1:] for words in commands if words[1] == "report"]
        assert len(reports) == 3
        for words in reports:
            assert words[1:3] == both
            assert main([*words, *["--new-tokens", "2"] * ("--prompt" in words)]) == 0


def test_elsewhere_no_folder_of_this_machine_is_named(apart):
    """Where the outputs are not below the folder that the user stands in, a command says so."""
    folders = [str(apart / name / "small") for name in ("pruned", "ranked")]
    with contextlib.chdir(apart / "deeper"):
        page = html.render(read(folders))
        assert str(apart) not in page and apart.name not in page
        places = ["PATH/TO/model", "PATH/TO/small", "PATH/TO/small"]
        assert ["liar", "bench", "serve", *places, "--json", "serve.json"] in _suggested(page)
        assert page.count("For PATH/TO give the folder") == 1
        assert "pruned/small" in page and "ranked/small" in page
        near = html.render(read(["../pruned/small"]))
        assert ["liar", "report", "../pruned/small", "--serve", "serve.json"] in _suggested(near)


def test_an_encoder_shows_the_nearest_sentences(tmp_path, inputs_of_encoder):
    folder, sentences = inputs_of_encoder
    out = tmp_path / "small"
    place = ["--out", str(out), "--calibration", str(sentences), "--samples", "48"]
    assert main(["prune", str(folder), *place, "--seq-len", "16"]) == 0
    assert main(["report", str(out), "--prompts", str(sentences)]) == 0
    text = (out / "report.html").read_text()
    assert "liar eval PATH/TO/small --stsb FILE.csv" in text
    assert "Nearest sentences" in text
    assert "The same nearest sentence as the dense model: small" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--serve", "model.json"], "--serve model.json: not what `liar bench serve"),
        (["--compare", "model.json"], "--compare model.json: not a comparison.json"),
        (["--compare", "old.json"], "has no 'axes'; make it again"),
        (["--eval", "serve.json"], "is what `liar bench serve` wrote; give it with --serve"),
        (["--eval", "old.json"], "--eval old.json: not what `liar eval --json` prints"),
        (["--serve", "no.json"], "cannot be read (No such file or directory); check the path"),
        (["--eval", "empty.json"], "--eval empty.json: cannot be read as JSON"),
        (["--dense", "model"], "--dense model: is for examples; give --prompt"),
        (["--prompt", "x", "--dense", "resnet"], "resnet"),
        (["--prompt", "x", "--new-tokens", "0"], "--new-tokens 0: must be at least 1"),
        (["--prompts", "empty.json"], "--prompts empty.json: is empty; give a prompt a line"),
        (["pruned"], "pruned: is given twice"),
        (["broken"], "broken: its report has no 'dropped'; it is of another release"),
        (["strange"], "of a kind 'strange' that this release does not know"),
        (["graph"], "graph: was exported for another engine; give the folder that it was made"),
    ],
)
def test_what_cannot_be_shown_is_refused_and_nothing_is_written(
    made, full, tmp_path, capsys, options, says
):
    files = {"old.json": {"source": "x", "cells": [], "dense": {}, "evaluations": {}}}
    report = json.loads((made / "replaced" / "liar_report.json").read_text())
    files["broken/liar_report.json"] = {k: v for k, v in report.items() if k != "replacement"}
    files["strange/liar_report.json"] = {**report, "kind": "strange"}
    files["graph/liar_report.json"] = {**report, "kind": "exported"}
    for name in ("model", "pruned", "resnet", "model.json", "serve.json"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "empty.json").write_text("")
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(data))
    with contextlib.chdir(tmp_path):
        assert main(["report", "pruned", *options, "--out", "new.html"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "new.html").exists()


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_it_whole_at_any_width_and_asks_for_nothing(full, tmp_path, dark):
    with chromium(tmp_path) as browser:
        page = browser.open(full, width=1200, dark=dark)
        for width in (1200, 400):
            page.resize(width, 900)
            assert page.evaluate("innerWidth") == width
            # what is wider scrolls in a region of its own, not the page
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            outside = """[...document.querySelectorAll("body *")].filter(e => {
                const r = e.getBoundingClientRect();
                return r.right > innerWidth + 1 && r.width && !e.closest(".wide, nav, .skip");
            }).map(e => e.outerHTML.slice(0, 80))"""
            assert page.evaluate(outside) == []
        assert page.problems == []
        assert page.requests == [full.resolve().as_uri()]
        colours = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(colours) == ("rgb(18, 22, 27)" if dark else "rgb(255, 255, 255)")
        # a blank page compresses to little: 400 x 900 of one colour is 2 kB
        assert len(page.screenshot()) > 20_000
        unseen = """[...document.querySelectorAll("figure svg")].filter(e => {
            const r = e.getBoundingClientRect();
            return !e.closest("details:not([open])") && (r.width < 150 || r.height < 50);
        }).length"""
        assert page.evaluate(unseen) == 0


@needs_chromium
def test_the_keyboard_and_a_screen_reader_reach_everything(full, tmp_path):
    with chromium(tmp_path) as browser:
        page = browser.open(full, width=1200)
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        roles = {}
        for node in nodes:
            if not node.get("ignored"):
                name = node.get("name", {}).get("value", "")
                roles.setdefault(node["role"]["value"], []).append(name)
        assert len(roles["heading"]) > 8 and len(roles["navigation"]) == 1
        pictures = roles.get("image", []) + roles.get("img", [])
        assert pictures and all(pictures), "a picture without a name"
        assert all(roles["table"]), "a table without a name"
        # the first Tab goes to the link that skips the contents, and Enter to the content
        for key, code in (("Tab", 9), ("Enter", 13)):
            event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            page.call("Input.dispatchKeyEvent", type="keyDown", text="\r" * (code == 13), **event)
            page.call("Input.dispatchKeyEvent", type="keyUp", **event)
            if key == "Tab":
                assert page.evaluate("document.activeElement.className") == "skip"
        assert page.evaluate("location.hash") == "#content"
        # what scrolls can be reached and scrolled by keys
        assert page.evaluate("[...document.querySelectorAll('.wide')].every(e => !e.tabIndex)")


@needs_chromium
def test_on_paper_everything_is_open(full, tmp_path):
    with chromium(tmp_path) as browser:
        page = browser.open(full, width=800)
        seen = "document.querySelector('details:not([open]) table').checkVisibility()"
        assert not page.evaluate(seen)
        page.call("Emulation.setEmulatedMedia", media="print")
        assert page.evaluate(seen)
        # paper does not scroll: what is too wide would be cut
        page.resize(700, 900)
        cut = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth)"
        assert page.evaluate(f"{cut}.map(e => e.ariaLabel)") == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 700
        assert page.pdf().startswith(b"%PDF-")
