"""The model card: valid front matter, the right loading code, and no claims without evidence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers
import yaml

from liar_ext.export.report import export_card
from liar_ext.report.card import model_card
from liar_ext.report.loading import auto_class


def front_matter(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_front_matter_of_a_stock_model(make_report):
    data = front_matter(model_card(make_report()))
    assert data["library_name"] == "transformers"
    assert data["base_model"] == "meta-llama/Llama-2-7b-hf"
    assert data["pipeline_tag"] == "text-generation"
    assert {"pruned", "liar-ext", "llama"} <= set(data["tags"])


@pytest.mark.parametrize("source", ["/data/model", "./a/b", "a/b/c", "model", "~/model", "a/b c"])
def test_a_path_is_no_base_model(make_report, source):
    assert "base_model" not in front_matter(model_card(make_report(source=source)))


def test_an_existing_folder_is_no_base_model(make_report, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in front_matter(model_card(make_report(source="owner/name")))


def test_paths_of_the_machine_are_not_published(make_report):
    card = model_card(make_report(source="/home/ada/secret/model"))
    assert "/home/ada" not in card
    assert "`model`" in card
    assert "`c4.txt`" in card


def test_stock_layout_is_loaded_by_transformers(make_report):
    card = model_card(make_report())
    assert 'AutoModelForCausalLM.from_pretrained("PATH")' in card
    assert "liar_ext.load" not in card


def test_alias_layout_says_so(make_report):
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    card = model_card(make_report(layout="stock (as mistral)", config=config))
    assert "written as model type `mistral`" in card
    assert "AutoModelForCausalLM" in card


def test_other_layouts_are_loaded_by_liar_ext_and_the_card_says_why(make_report):
    card = model_card(make_report(layout="liar_ext"))
    assert 'liar_ext.load("PATH")' in card
    assert "from_pretrained" not in card
    assert "cannot be stated in a stock `llama` config" in card
    assert front_matter(card)["library_name"] == "liar-ext"
    assert "pipeline_tag" not in front_matter(card)


@pytest.mark.parametrize(
    ("architecture", "model_type", "expected"),
    [
        ("LlamaForCausalLM", "llama", "AutoModelForCausalLM"),
        ("LlamaModel", "llama", "AutoModel"),
        ("GPT2LMHeadModel", "gpt2", "AutoModelForCausalLM"),
        ("BertModel", "bert", "AutoModel"),
        ("BertForMaskedLM", "bert", "AutoModelForMaskedLM"),
        ("BertForSequenceClassification", "bert", "AutoModelForSequenceClassification"),
        ("DistilBertForQuestionAnswering", "distilbert", "AutoModelForQuestionAnswering"),
        (None, "opt", "AutoModelForCausalLM"),
        (None, "roberta", "AutoModel"),
    ],
)
def test_auto_class_gives_the_class_the_weights_were_saved_from(architecture, model_type, expected):
    config = {"model_type": model_type}
    if architecture is not None:
        config["architectures"] = [architecture]
        mapping = getattr(transformers, expected)._model_mapping
        own = transformers.AutoConfig.for_model(model_type)
        assert mapping[type(own)].__name__ == architecture
    assert auto_class(config) == expected


def test_numbers_of_the_report(make_report):
    card = model_card(make_report())
    assert "| parameters | 1 M | 760 k | −24.0 % |" in card
    assert "| FFN neurons per layer | 100 | 70 | −30.0 % |" in card
    assert "29.9 % (asked for 30.0 %)" in card
    assert "262,144 tokens" in card
    assert "ab" * 32 in card
    assert "median 2.0 %, from 1.0 %" in card
    assert "torch 2.13.0" in card


def test_quality_is_not_claimed_without_an_evaluation(make_report):
    assert "**Not measured.**" in model_card(make_report())


def test_evaluations_replace_the_disclaimer(make_report):
    one = {"source": "out", "metric": "perplexity", "value": 12.0, "dataset": "w.txt"}
    card = model_card(make_report(), [{**one, "standard_error": 0.12}])
    assert "Not measured" not in card
    assert "| `out` | `w.txt` | perplexity | 12 | 0.12 |" in card


def test_ridge_used_and_ladder_steps_are_told_once(make_report):
    report = make_report()
    step = "ridge 1.0e-04: not positive definite at pivot 3; raised to 1.0e-03"
    report.sites[3] = replace(report.sites[3], ridge_used=1e-3, steps=[step])
    report.warnings = [f"{report.sites[3].name}: {step}", "only 900 calibration tokens"]
    card = model_card(report)
    assert "asked for 0.0001, used 0.0001 to 0.001" in card
    assert card.count("raised to 1.0e-03") == 1
    assert "## Warnings" in card
    assert "- only 900 calibration tokens" in card


def test_a_reconstruction_that_solves_nothing(make_report):
    report = make_report()
    report.recipe["reconstruct"] = "none"
    report.sites = [
        replace(s, ridge_used=None, condition=None, relative_residual=None) for s in report.sites
    ]
    card = model_card(report)
    assert "No system was solved" in card
    assert "Relative residual" not in card
    assert "keep the rest of their weights as they were" in card


def test_a_report_from_memory_has_neither_bytes_nor_hash(make_report):
    report = make_report(calibration={"source": "memory", "samples": 2, "tokens": 64})
    report.totals = {k: v for k, v in report.totals.items() if not k.startswith("bytes")}
    card = model_card(report)
    assert "weight files" not in card
    assert "SHA-256" not in card


def test_names_from_outside_format_nothing(make_report):
    card = model_card(make_report(source="<script>alert(1)</script>|`x`", warnings=["<b>*x*</b>"]))
    heading = next(line for line in card.splitlines() if line.startswith("# "))
    assert "<script>" not in heading
    assert "- &lt;b>\\*x\\*&lt;/b>" in card


EXPORTS = {
    "of the hub": ("owner/name", None, "owner/name"),
    "of a pruned folder of the hub's": ("/data/small", "owner/name", "owner/name"),
    "of a folder of a folder": ("/data/small", "/data/model", None),
}


@pytest.mark.parametrize("library", ["transformers", "gguf", None])
@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_names_the_model_that_was_pruned(name, library):
    source, before, base = EXPORTS[name]
    report = {
        "source": source,
        "source_report": None if before is None else {"source": before},
        "config": {"model_type": "liar_ext", "liar_ext": {"base_model_type": "llama"},
                   "architectures": ["LlamaForCausalLM"]},
        "totals": {"parameters_before": 2, "parameters_after": 3},
        "environment": {"liar_ext": "0"},
        "export": {},
    }  # fmt: skip
    card = export_card(report, ("gguf",), library, "for an engine", "It is a file.")
    data = front_matter(card)
    assert data.get("base_model") == base
    assert data.get("library_name") == library
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["liar-ext", "pruned", "gguf", "llama"]
    assert "/data" not in card
