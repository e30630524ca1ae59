"""The model card of a checkpoint that was trained a little."""

from __future__ import annotations

import json
from typing import Any

from liar_ext.models import layout
from liar_ext.report.front_matter import front_matter, library_of
from liar_ext.report.markdown import plain
from liar_ext.report.schema import FILE
from liar_ext.report.text import number, short_name


def card(report: dict[str, Any]) -> str:
    """`README.md`, from what the report says."""
    totals, training = report["totals"], report["training"]
    loader = (
        "liar_ext.load" if layout.KEY in report["config"] else "transformers' `from_pretrained`"
    )
    return (
        front_matter(report, ("fine-tuned",), library_of(report["config"]))
        + f"\n# {plain(short_name(report['source']))}, trained a little\n\n"
        f"{_what(report)} {training['steps']} steps, {training['tokens']:,} tokens; "
        f"{training['parameters']:,} parameters were trained. {_measured(training)}\n\n"
        f"{totals['parameters_before']:,} parameters before, {totals['parameters_after']:,} after. "
        f"Loads with {loader}.\n\n"
        f"Made by liar-ext {report['environment']['liar_ext']}; `{FILE}` has the rest:\n\n"
        f"```json\n{json.dumps(report['recovery'])}\n```\n"
    )


def _what(report: dict[str, Any]) -> str:
    recovery, training = report["recovery"], report["training"]
    if recovery["method"] == "lora":
        ranks = ", ".join(map(str, training["ranks"]))
        return (
            "Low-rank adapters on the linears of all layers were trained on the next tokens of a "
            f"text and merged into them (ranks {ranks}, layer by layer)."
        )
    layers = ", ".join(map(str, training["trained_layers"]))
    head = ""
    if recovery["head"]:
        head = " and the head, which was untied from the embeddings," * recovery["untie"]
        head = head or " and the head"
    return (
        f"Layers {layers}, what follows them{head} were trained on the next tokens of a text, all "
        "else is as it was."
    )


def _measured(training: dict[str, Any]) -> str:
    looks = training["held_out"]
    if len(looks) < 2:
        return "Its quality was not measured."
    return (
        f"On {training['held_out_windows']} windows of that text that were held out, the loss was "
        f"{number(looks[0]['loss'], 4)} nats a token before and {number(looks[-1]['loss'], 4)} "
        "after. Nothing else was measured."
    )
