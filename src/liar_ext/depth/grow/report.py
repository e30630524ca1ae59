"""The model card of a grown checkpoint."""

from __future__ import annotations

from typing import Any

from liar_ext.depth.grow.predictors import PREDICTORS
from liar_ext.depth.report import layer_card
from liar_ext.report.text import number


def card(report: dict[str, Any]) -> str:
    """`README.md`, from what the report says."""
    layers, growth = report["layers"], report["growth"]
    how = PREDICTORS[growth["predictor"]].made
    behind = ", ".join(map(str, layers["inserted_after"]))
    more = len(layers["inserted"])
    return layer_card(
        report,
        ("depth-up-scaling",),
        f"with {more} more layer{'s' * (more > 1)}",
        f"{layers['before']} layers before, {layers['after']} after: one was inserted behind each "
        f"of layers {behind}, counted from 0 in the source; in this model they are layers "
        f"{', '.join(map(str, layers['inserted']))}. {how} The other layers are as they were.\n\n"
        f"{_training(report['training'])}",
    )


def _training(training: dict[str, Any] | None) -> str:
    if training is None:
        return (
            "The new layers were not trained, and until they are there is no reason why the model "
            "should be better than the one that it was made from. Its quality was not measured."
        )
    told = (
        f"The new layers alone were trained on the next tokens of a text, {training['steps']} "
        f"steps, {training['tokens']:,} tokens."
    )
    looks = training["held_out"]
    if len(looks) < 2:
        return told + " Its quality was not measured."
    return (
        f"{told} On {training['held_out_windows']} windows of that text that were held out, the "
        f"loss was {number(looks[0]['loss'], 4)} nats a token before and "
        f"{number(looks[-1]['loss'], 4)} after. Nothing else was measured."
    )
