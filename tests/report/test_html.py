"""The HTML report: one file that loads nothing, is well formed, and escapes what it is given."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from liar_page import Page

from liar_ext.errors import InputError
from liar_ext.report import html, plots
from liar_ext.report.examples import Example, Examples
from liar_ext.report.material import Material

BEFORE = {
    "source": "meta-llama/Llama-2-7b-hf",
    "metric": "perplexity",
    "value": 10.0,
    "standard_error": 0.1,
    "dataset": "heldout.txt",
}
AFTER = {**BEFORE, "source": "out/pruned", "value": 12.5}


@pytest.fixture(scope="module", params=["stock", "liar_ext"])
def page_text(request, make_report):
    return html.render(
        make_report(layout=request.param, warnings=["watch out"]),
        Material(evaluations=[BEFORE, AFTER]),
    )


def test_tags_are_balanced_and_every_plot_is_there(page_text):
    page = Page(page_text)
    assert page.count("svg") == 5
    # evaluations, phases, Sites, recipe, calibration, environment
    assert page.count("table") == 6
    assert "watch out" in page.text


def test_nothing_is_loaded_from_elsewhere(page_text):
    page = Page(page_text)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {t for t, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert attributes.get(name, "#").startswith("#")
    assert "@import" not in page_text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page_text))
    assert "http" not in page_text


def test_ids_are_unique_and_references_resolve(page_text):
    page = Page(page_text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"|aria-labelledby="([^"]*)"', page_text)
    assert {name for names in used for name in names if name} <= set(ids)


def test_colours_follow_the_page(page_text):
    plots = "".join(re.findall(r"<svg.*?</svg>", page_text, flags=re.S))
    assert not re.findall(r"#[0-9a-f]{6}\b", plots)
    assert "currentColor" in plots
    assert "prefers-color-scheme: dark" in page_text


def test_every_plot_has_a_name_and_every_table_a_caption(page_text):
    page = Page(page_text)
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in svgs)
    assert page.count("caption") == page.count("table")
    assert page.count("figcaption") == len(svgs)


def test_what_comes_from_outside_is_escaped(make_report):
    evil = '<script>alert("x")</script>'
    report = make_report(source=f"/tmp/{evil}", warnings=[evil])
    report.sites[0] = replace(report.sites[0], name=evil, steps=[evil])
    report.calibration["source"] = evil
    report.environment["device"] = evil
    report.recipe["calibration"] = evil
    text = html.render(
        report,
        Material(
            evaluations=[{**BEFORE, "source": evil, "metric": "$" + evil, "dataset": evil}],
            serves=[
                {"device": evil, "entries": [{"name": evil, "dtype": evil, "tokens_per_s": 1}]}
            ],
            examples=Examples([Example(evil, {"dense": evil, evil: "$1" + evil})], evil),
        ),
    )
    assert "<script" not in text
    assert Page(text).count("script") == 0


def test_evaluations_are_compared_with_the_dense_model(make_report):
    # given the wrong way round
    text = html.render(make_report(), Material(evaluations=[AFTER, BEFORE]))
    page = Page(text)
    rows = [t for t in page.text if t in ("pruned", "meta-llama/Llama-2-7b-hf (dense)")]
    assert rows[0].endswith("(dense)")
    assert "+25.0 %" in page.text
    assert "± 0.1" in page.text
    assert "Lower is better" in text


def test_a_task_is_not_compared_with_another_one_in_a_file_of_the_same_name(make_report):
    def one(source: str, task: str, value: float, **more: object) -> dict[str, object]:
        base = {"metric": "accuracy", "kind": "glue", "standard_error": 1.0}
        return {
            **base,
            "source": source,
            "dataset": f"{task}=glue/{task}/dev.tsv",
            "value": value,
            **more,
        }

    dense, pruned = BEFORE["source"], AFTER["source"]
    page = Page(
        html.render(
            make_report(),
            Material(
                evaluations=[
                    one(dense, "sst2", 92.0),
                    one(dense, "rte", 66.0),
                    one(pruned, "sst2", 91.0),
                    one(pruned, "rte", 60.0),
                    one(dense, "mrpc", 80.0, seq_len=64),
                    one(pruned, "mrpc", 70.0, seq_len=128),
                ]
            ),
        )
    )
    text = "".join(page.text)
    assert "sst2=dev.tsv" in text
    assert "−1.1 %" in text
    assert "−9.1 %" in text
    # of 60 from 92, and of 70 from 80 on other lengths
    assert "−34.8 %" not in text
    assert "−12.5 %" not in text


def test_who_chose_a_length_makes_no_other_figure(make_report):
    def one(source: str, value: float, chosen: str) -> dict[str, object]:
        protocol = {"name": "plain", "seq_len_from": chosen}
        return {**BEFORE, "source": source, "value": value, "seq_len": 256, "protocol": protocol}

    evaluations = [
        one(BEFORE["source"], 10.0, "the model's limit"),
        one(AFTER["source"], 12.5, "as asked for"),
    ]
    text = "".join(Page(html.render(make_report(), Material(evaluations=evaluations))).text)
    assert "+25.0 %" in text


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        (
            {"measured": {"influence": [0.5, 0.25, 0.75]}},
            [["0", "0.5", "kept"], ["1", "0.25", "left out"], ["2", "0.75", "left out"]],
        ),
        # one after the other: each loss is that of its layer, in whatever order they went
        (
            {"measured": {}, "steps": [{"layer": 2, "loss": 4.5}, {"layer": 1, "loss": 4.75}]},
            [
                ["0", "–", "kept"],
                ["1", "4.75", "left out (2 of 2)"],
                ["2", "4.5", "left out (1 of 2)"],
            ],
        ),
    ],
)
def test_what_was_measured_of_a_layer_is_in_its_row(make_report, fields, rows):
    report = make_report(layers={"before": 3, "after": 1, "dropped": [1, 2], **fields})
    table = html.render(report).partition("<h3>Layers</h3>")[2].partition("</table>")[0]
    lines = table.partition("<tbody>")[2].split("<tr>")[1:]
    assert [re.findall(r">([^<\n]+)<", line) for line in lines] == rows


def test_without_evaluations_the_page_says_that_nothing_was_measured(make_report):
    text = html.render(make_report())
    assert "Quality of this model was not measured" in text
    assert "liar eval out --text FILE.txt --json" in text


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"metric": "perplexity", "value": 1.0}, "no source"),
        ({**BEFORE, "value": float("nan")}, "no finite number"),
        ({**BEFORE, "value": "12"}, "no finite number"),
        ({**BEFORE, "standard_error": "much"}, "no finite number"),
        ([1, 2], "must be an object"),
    ],
)
def test_a_malformed_evaluation_is_an_input_error(make_report, broken, message):
    with pytest.raises(InputError, match=message):
        html.render(make_report(), Material(evaluations=[broken]))


def test_sites_without_residual_or_solve_draw_fewer_plots(make_report):
    report = make_report()
    report.sites = [
        replace(s, relative_residual=None, ridge_used=None, condition=None) for s in report.sites
    ]
    assert Page(html.render(report)).count("svg") == 2


def test_zero_ridge_and_zero_seconds_can_be_drawn(make_report):
    report = make_report(seconds=dict.fromkeys(("load", "forward", "total"), 0.0))
    report.sites = [replace(s, ridge=0.0, ridge_used=0.0) for s in report.sites]
    assert Page(html.render(report)).count("svg") == 4


def test_the_same_report_gives_the_same_plot(make_report):
    report = make_report()
    assert plots.widths(report) == plots.widths(report)


@pytest.fixture
def folder(make_report, tmp_path):
    from liar_ext.checkpoint.writer import write_json
    from liar_ext.report.schema import FILE

    write_json(tmp_path / FILE, make_report().to_json())
    return tmp_path


def test_write_makes_one_file_in_the_folder(folder):
    before = set(folder.iterdir())
    path = html.write(folder)
    assert path == folder / "report.html"
    assert set(folder.iterdir()) - before == {path}
    Page(path.read_text(encoding="utf-8"))


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    target = folder / "page.html"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr(html, "render", lambda *_: "new")
    with pytest.raises(InputError, match="No space left"):
        html.write(folder, target)
    assert target.read_text() == "old"
    assert not list(folder.glob(".page.html*"))


def test_a_place_that_does_not_exist_is_an_input_error(folder, monkeypatch):
    monkeypatch.setattr(html, "render", lambda *_: "new")
    with pytest.raises(InputError, match="cannot be written"):
        html.write(folder, folder / "no" / "where.html")


def test_a_folder_without_a_report_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="liar prune"):
        html.write(tmp_path)
