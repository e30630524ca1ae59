"""Sections about folders that were not pruned Site by Site: whole layers left out, merged, inserted
or replaced; models that were trained a little; convolutional networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from liar_ext.report import plots, plots_measured
from liar_ext.report.outputs import Output
from liar_ext.report.page import Html, details, element, figure, join, paragraph, records, table
from liar_ext.report.page import plots as grid
from liar_ext.report.pruned import layers_measured
from liar_ext.report.schema import CONVOLUTIONS, LAYERS
from liar_ext.report.text import NONE, layers, number, percent

# of the report's own fields, what has tables of its own here or is for machines
_SETTINGS = {
    "merge": "How layers were merged",
    "growth": "How layers were grown",
    "replacement": "What stands in for the window",
    "recovery": "What was trained",
    "settings": "What was asked for",
    "images": "Images",
}
_MACHINES = ("sketch", "names", "log", "accepted", "refused", "matrices", "held_out")


def happened(output: Output, name: str) -> Html:
    """What was done and what it did; `name` is unique on the page."""
    data = output.data
    own: list[str] = []
    if output.kind == LAYERS:
        own += [_moved(data), layers_measured(data["layers"], f"{name}-layers"), _merged(data)]
    if output.kind == CONVOLUTIONS:
        own += [_network(data, name), _plan(data)]
    training = data.get("training")
    if isinstance(training, Mapping) and "held_out" in training:
        own.append(_training(training, data, f"{name}-training"))
    if isinstance(spent := data.get("seconds_by"), Mapping) and spent:
        own.append(_times(spent, data, f"{name}-time"))
    own += [
        details(title, records(f"{title}.", _plain(data[key])))
        for key, title in _SETTINGS.items()
        if isinstance(data.get(key), Mapping)
    ]
    if data.get("calibration"):
        calibration = _plain(data["calibration"])
        own.append(details("Text", records("The text that was read.", calibration)))
    own.append(
        details("Environment", records("Versions and device of the run.", output.environment))
    )
    return join(own)


def _moved(data: Mapping[str, Any]) -> Html:
    """Where each layer of the result comes from, as far as the report says it."""
    of = data["layers"]
    before, after = of["before"], of["after"]
    if "inserted" in of:
        new = dict(zip(of["inserted"], of["inserted_after"], strict=True))
        rows, next_ = [], 0
        for at in range(after):
            if at in new:
                rows.append([str(at), NONE, f"new, behind layer {new[at]} of the source"])
                continue
            rows.append([str(at), str(next_), "as it was"])
            next_ += 1
    elif "replaced" in of:
        first, last = of["replaced"]
        trained, gone = of["trained"], last - first + 1
        rows = []
        for at in range(after):
            if at in trained:
                rows.append([str(at), NONE, f"trained, in place of {first} to {last}"])
            else:
                origin = at if at < first else at - len(trained) + gone
                rows.append([str(at), str(origin), "as it was"])
    else:
        dropped = set(of["dropped"])
        took = {m["layer"]: m["with"] for m in of.get("merged", ()) if isinstance(m, Mapping)}
        kept = [at for at in range(before) if at not in dropped]
        rows = [
            [
                str(at),
                str(origin),
                f"took in {layers(took[origin])}" if origin in took else "as it was",
            ]
            for at, origin in enumerate(kept)
        ]
    shown = table(
        f"Layers of the result ({after}) and of the source ({before}), counted from 0.",
        ["layer", "in the source", "what it is"],
        rows,
        words=("what it is",),
    )
    return details("Where each layer comes from", shown, opened=len(rows) <= 16)


def _merged(data: Mapping[str, Any]) -> Html:
    merge = data.get("merge")
    if not isinstance(merge, Mapping) or not merge.get("accepted"):
        return Html("")
    rows = [
        [str(step["layer"]), layers(step["with"]), number(step["similarity"], 4), word]
        for word, steps in (("merged", merge["accepted"]), ("refused", merge.get("refused", ())))
        for step in steps
        if isinstance(step, Mapping) and {"layer", "with", "similarity"} <= step.keys()
    ]
    return table(
        f"Merges that were tried; accepted above a similarity of {number(merge['threshold'], 4)}.",
        ["into layer", "layers", "similarity", "what became of it"],
        rows,
        words=("layers", "what became of it"),
    )


def _training(training: Mapping[str, Any], data: Mapping[str, Any], name: str) -> Html:
    looks, kept = training["held_out"], training.get("kept")
    loss = data.get("replacement", {}).get("loss")
    unit = "squared error an element of the hidden states" if loss == "mse" else "nats a token"
    rows = [
        [str(look["step"]), number(look["loss"], 5), "kept" if look["step"] == kept else ""]
        for look in looks
    ]
    numbers = table("Held-out loss.", ["updates", "loss", ""], rows, words=("",))
    windows = training.get("held_out_windows", 0)
    drawn = figure(
        plots_measured.training(looks, kept, name),
        f"Loss ({unit}) on {windows} windows of the training text that were held out. The square "
        "is the state that was kept.",
        numbers,
    )
    told = "" if looks else paragraph("No windows were held out: whether it helped is not known.")
    facts = {
        key: training[key]
        for key in ("steps", "tokens", "parameters", "windows", "held_out_windows", "seq_len")
        if key in training
    }
    if "nothing" in training:
        facts["loss with nothing in their place"] = training["nothing"]
    if "ranks" in training:
        facts["ranks, layer by layer"] = training["ranks"]
    if "trained_layers" in training:
        facts["trained layers"] = training["trained_layers"]
    schedule = training.get("schedule")
    return join(
        [
            element("h3", "Training"),
            grid([drawn]),
            told,
            records("What was trained, on how much.", facts),
            details("Schedule", records("Of the optimiser.", schedule)) if schedule else "",
        ]
    )


def _times(spent: Mapping[str, float], data: Mapping[str, Any], name: str) -> Html:
    total = data.get("seconds")
    seconds = plots.phases({**spent, "total": total or sum(spent.values())})
    numbers = table(
        "Seconds by phase.",
        ["phase", "seconds"],
        [[phase, number(value, 4)] for phase, value in seconds.items()],
    )
    return grid([figure(plots.time_split(seconds, name), "Where the time went.", numbers)])


def _network(data: Mapping[str, Any], name: str) -> Html:
    """Accuracy and time of the stages of a convolutional network."""
    quality = {stage: one for stage, one in data["quality"].items() if one}
    latency = data["latency"]
    rows = [
        {"label": stage, "value": 100 * one["accuracy"], "dense": stage == "dense"}
        for stage, one in quality.items()
    ]
    numbers = table(
        "On held-out images.",
        ["network", "accuracy", "loss"],
        [
            [stage, percent(one["accuracy"], 2), number(one.get("loss"), 4)]
            for stage, one in quality.items()
        ],
    )
    shares = [
        {"label": "dense", "value": 1.0, "dense": True},
        *(
            {"label": label, "value": latency[label]}
            for label in ("asked", "predicted", "measured")
            if isinstance(latency.get(label), int | float)
        ),
    ]
    return grid(
        [
            figure(
                plots_measured.bars(rows, "accuracy, %", f"{name}-accuracy"),
                "Accuracy on held-out images: as merged, repaired by least squares, and at the "
                "end. Higher is better.",
                numbers,
            ),
            figure(
                plots_measured.bars(shares, "share of the dense network's time", f"{name}-share"),
                "Time of the whole network, batch norms folded in, measured in the same rounds. "
                "Lower is better.",
                records("Shares of the dense network's time.", _plain(latency)),
            ),
        ]
    )


def _plan(data: Mapping[str, Any]) -> Html:
    plan = [segment for segment in data.get("plan", ()) if isinstance(segment, Mapping)]
    if not plan:
        return Html("")
    columns = [key for key in plan[0] if not isinstance(plan[0][key], dict) and key != "repair"]
    rows = [[_cell(segment.get(key)) for key in columns] for segment in plan]
    shown = table(
        "Segments of the network, in order.", [c.replace("_", " ") for c in columns], rows
    )
    return details(f"The plan: {len(plan)} segments", shown)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 4)
    return NONE if value is None else str(value)


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in _MACHINES}
