"""What a merge of layers did, as data and as a model card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from liar_ext.depth.collapse import Outcome, Trial, listed
from liar_ext.depth.merge_settings import MergeSettings
from liar_ext.depth.mixture import Mixture, Terms
from liar_ext.depth.report import layer_card
from liar_ext.depth.rules import norms_of
from liar_ext.depth.trials import Evaluations
from liar_ext.report.text import number


def layer_facts(count: int, outcome: Outcome) -> dict[str, Any]:
    """Which layers went where, by their places in the source.

    `merged`: `layer` at `place` of the result took in `with`; `weights` and `norms` say what is
    summed. `dropped`: all that have no place of their own any more.
    """
    kept = [mixture.base for mixture in outcome.state]
    within: dict[int, list[int]] = {}
    for trial in outcome.accepted:
        taken = [within.pop(layer, []) for layer in trial.absorbed]
        own = [*trial.absorbed, *(layer for layers in taken for layer in layers)]
        within[trial.base] = sorted(own)
    return {
        "before": count,
        "after": len(kept),
        "dropped": sorted(set(range(count)) - set(kept)),
        "merged": [
            {
                "layer": mixture.base,
                "place": place,
                "with": within[mixture.base],
                "weights": _sum(mixture.weights),
                "norms": _sum(mixture.norms),
            }
            for place, mixture in enumerate(outcome.state)
            if mixture.base in within
        ],
    }


def merge_facts(
    settings: MergeSettings, count: int, outcome: Outcome, evaluations: Evaluations
) -> dict[str, Any]:
    """Settings as they were used, similarities, and how many layers were run."""
    return {
        **used_settings(settings, count),
        "threshold": outcome.threshold,
        "threshold_chosen": settings.threshold is None,
        "accepted": [_trial(trial) for trial in outcome.accepted],
        "refused": [_trial(trial) for trial in outcome.refused],
        "layer_evaluations": dataclasses.asdict(evaluations),
    }


def used_settings(settings: MergeSettings, count: int) -> dict[str, Any]:
    """Settings as a model of `count` layers has them."""
    schedule = dataclasses.asdict(settings.schedule(count))
    del schedule["count"]
    return {**settings.to_json(), "norms": norms_of(settings.rule, settings.norms), **schedule}


def mixed_types(types: Sequence[str] | None, state: Sequence[Mixture]) -> list[str]:
    """A warning for each merge of layers of different attention types.

    Args:
        types: of the source's layers, where its config has them.
    """
    if types is None:
        return []
    found = []
    for mixture in state:
        other = {types[layer] for layer, _ in mixture.weights} - {types[mixture.base]}
        if other:
            found.append(
                f"layer {mixture.base} attends by {types[mixture.base]} with weights of layers of "
                f"{', '.join(sorted(other))}"
            )
    return found


def card(report: dict[str, Any]) -> str:
    """The README.md of the result."""
    layers, merge = report["layers"], report["merge"]
    rows = [
        f"| {step['layer']} | {listed(step['with'])} | {number(step['similarity'], 4)} |"
        for step in merge["accepted"]
    ]
    return layer_card(
        report,
        ("pruned", "layer-merging"),
        f"with {layers['after']} of its {layers['before']} layers",
        "Layers were merged (LaCo, arXiv 2402.11187), each into the one before it; counted from "
        "0:\n\n| layer | takes in | similarity to the original |\n|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nRule `{merge['rule']}`, norms `{merge['norms']}`; the similarity "
        f"(`{merge['similarity']}`) of last hidden states on {report['calibration']['samples']} "
        f"texts was to be above {number(merge['threshold'], 4)}. Nothing was trained; the quality "
        "was not measured.",
    )


def _trial(trial: Trial) -> dict[str, Any]:
    known = math.isfinite(trial.similarity)
    return {
        "layer": trial.base,
        "with": list(trial.absorbed),
        "layers": trial.layers,
        "similarity": trial.similarity if known else None,
    }


def _sum(terms: Terms) -> dict[str, str]:
    return {str(layer): str(factor) for layer, factor in terms}
