"""The commands that make an output again, and those that measure what a page lacks."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from liar_ext.evaluation.task import DECODER, ENCODER, ENCODER_DECODER, METRICS
from liar_ext.report.outputs import PRUNED, Output
from liar_ext.report.page import without_folders
from liar_ext.report.schema import CONVOLUTIONS, LAYERS, RECOVERED

# what stands for a folder that is not below the one in which a page is made
ELSEWHERE = "PATH/TO"
# of a training's schedule: option by field; what has no option is not said
_SCHEDULE = {
    "learning_rate": "lr",
    "warmup": "warmup",
    "floor": "floor",
    "batch_size": "batch-size",
    "accumulation": "accumulation",
    "weight_decay": "weight-decay",
    "clip": "clip",
    "evaluate_every": "evaluate-every",
}
# options of `liar merge`, as its report has them
_MERGE = (
    *("rule", "norms", "combine", "lowest", "highest", "interval", "similarity", "calibration"),
    *("texts", "seq_len", "batch_size", "seed", "device", "dtype"),
)


def repeat(output: Output) -> str:
    """The command that makes the output again. Paths are cut to their last part.

    Raises:
        InputError: the report lacks what the command was told.
    """
    # imported here: it imports torch
    from liar_ext.models.traced import KEY

    stated = {PRUNED: _pruned, LAYERS: _layers, RECOVERED: _recovered, CONVOLUTIONS: _fused}
    try:
        words, options = stated[output.kind](output.data)
    except KeyError as error:
        raise output.lacks(error) from error
    source = without_folders(output.source)
    flags = [part for name, value in options.items() for part in _flag(name, value)]
    # of a family without an adapter
    if KEY in output.data.get("config", {}) and words in ("prune", "merge"):
        flags.append("--trace")
    return _line("liar", words, source, "--out", output.label, *flags)


_FILES = {"text": "FILE.txt", "stsb": "FILE.csv", "pairs": "FILE.jsonl"}


def evaluate(source: str, kind: str, dataset: str, *, model: str = DECODER) -> str:
    """The command that measures one model as another was, or as its kind is measured.

    Args:
        source: as the command takes it (`from_here`).
        kind, dataset: of the evaluation, as its JSON has them; empty where there was none.
        model: what it is (`task`).
    """
    usual = {DECODER: "text", ENCODER: "stsb", ENCODER_DECODER: "pairs"}[model]
    given = str(METRICS[usual].option), _FILES[usual]
    if kind in METRICS and METRICS[kind].option and dataset:
        path = METRICS[kind].source(dataset)
        # tasks of the harness are names, and no paths
        place = path if kind == "lm-eval" else from_here(path)
        given = str(METRICS[kind].option), dataset.removesuffix(path) + place
    return _line("liar", "eval", source, *given, "--json")


def command(*words: str) -> str:
    """`liar` with these words, as a shell takes them."""
    return shlex.join(("liar", *words))


def from_here(path: str | Path) -> str:
    """A path, as a command takes it in the folder in which the page is made.

    A page does not say where on a machine that folder is. So of a path that is not below it the
    last part is left, under `ELSEWHERE`, for the reader to fill in. Hub ids, and relative names
    that may be some, stay as they are.
    """
    text = str(path)
    place, base = Path(os.path.abspath(text)), Path.cwd()
    if place.is_relative_to(base) and (place.exists() or Path(text).is_absolute()):
        inside = str(place.relative_to(base))
        return f"./{inside}" if inside.startswith("-") else inside
    if text == without_folders(text) and (place.exists() or not text.startswith(".")):
        return text
    return f"{ELSEWHERE}/{place.name}"


def _line(*words: str) -> str:
    """One command, broken before options where it is long."""
    line = shlex.join(words)
    if len(line) <= 88:
        return line
    parts, first = [], words.index("--out") if "--out" in words else len(words)
    parts.append(shlex.join(words[:first]))
    own: list[str] = []
    for word in words[first:]:
        if word.startswith("--") and own:
            parts.append(shlex.join(own))
            own = []
        own.append(word)
    if own:
        parts.append(shlex.join(own))
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 1 + len(part) > 86:
            lines.append(f"  {part}")
        else:
            lines[-1] += f" {part}"
    return " \\\n".join(lines)


def _flag(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    if isinstance(value, list | tuple):
        return [option, (":" if name == "layers" else ",").join(map(str, value))]
    return [option, without_folders(str(value))]


def _pruned(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    from liar_ext.recipe import Recipe

    recipe = data["recipe"]
    usual = {field.name: field.default for field in fields(Recipe)}
    stated = ("sparsity", "target", "criterion", "allocation", "reconstruct")
    shortens = recipe.get("depth") is not None or recipe.get("drop_layers") is not None
    options = {}
    for name, value in recipe.items():
        if name not in usual or (name == "sparsity" and shortens and not value):
            continue
        default = usual[name]
        default = list(default) if isinstance(default, tuple) else default
        if value != default or (name in stated and recipe.get("sparsity", 1)):
            options[name] = value
    return "prune", options


def _layers(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    of = data["layers"]
    if "growth" in data:
        growth = data["growth"]
        options = growth.get("options") or {}
        code = options.get("norm_weight") == 5e-4
        return "grow", {
            "insert": growth["gaps"],
            "predictor": growth["predictor"],
            "hyper_parameters": "code" if code else None,
            "epochs": options.get("epochs"),
            "seed": growth["seed"],
            **_training(data),
        }
    if "replacement" in data:
        asked = data["replacement"]
        first, last = of["replaced"]
        chosen = asked.get("drop") is not None
        where = {name: asked.get(name) for name in ("drop", "depth", "samples")}
        return "replace", {
            **(where if chosen else {"window": f"{first}-{last}"}),
            **{
                name: asked.get(name) for name in ("network", "init", "loss", "loss_tokens", "keep")
            },
            "count": asked.get("count") if asked.get("network") == "layers" else None,
            **_training(data),
        }
    if "merge" in data:
        merge = data["merge"]
        threshold = None if merge.get("threshold_chosen") else merge.get("threshold")
        own = {name: merge.get(name) for name in _MERGE}
        return "merge", {"drop": merge.get("drop"), "threshold": threshold, **own}
    return "prune", {"drop_layers": of["dropped"]}


def _recovered(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    of = data["recovery"]
    options: dict[str, Any] = {"method": of["method"]}
    if of["method"] == "partial":
        options |= {"last": of["last"], "untie": of["untie"], "no_head": not of["head"]}
        options["cache_states"] = of.get("cache_states")
    else:
        options |= {name: of.get(name) for name in ("ranks", "rank", "dense")}
        options |= {f"trial_{name}": value for name, value in (of.get("search") or {}).items()}
    return "recover", {**options, **_training(data)}


def _fused(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    settings = dict(data["settings"])
    settings["lr"] = settings.pop("learning_rate", None)
    return "fuse", settings


def _training(data: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a training on a text; empty where there was none."""
    training = data.get("training")
    if not training:
        return {}
    schedule = training.get("schedule") or {}
    options = {option: schedule.get(name) for name, option in _SCHEDULE.items()}
    return {
        "train": (data.get("calibration") or {}).get("source"),
        "steps": schedule.get("steps", training["steps"]),
        "seq_len": training.get("seq_len"),
        "held_out": training.get("held_out_windows"),
        **options,
        "seed": schedule.get("seed"),
    }
