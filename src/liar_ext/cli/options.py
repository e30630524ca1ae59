"""The recipe as command-line options, shared by every command that takes one."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from liar_ext.cli.option_table import Options
from liar_ext.errors import InputError


def ridge(text: str) -> float | str:
    """`auto`, or a number."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number or auto") from None


def round_to(text: str) -> int | str:
    """A number, `auto`, or a file."""
    return int(text) if text.lstrip("+-").isdecimal() else text


def refuse_torchrun(why: str) -> None:
    """Raises InputError where this is one of several processes that torchrun has started."""
    if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise InputError(f"WORLD_SIZE is {size}: {why}")


# what an option may be, by its field of the Recipe; said in help and offered by completion. the
# registries themselves import torch, which help should not: tests hold the two together
NAMES: dict[str, tuple[str, ...]] = {
    "budget": ("parameters", "flops", "latency"),
    "target": ("ffn", "heads"),
    "criterion": (
        *("magnitude", "magnitude-l1", "magnitude-producer", "magnitude-producer-l1"),
        *("magnitude-both", "magnitude-both-l1", "wanda", "flap", "flap-ifv", "flap-wifn", "rcpu"),
        *("leverage", "obs", "obs-swap", "snip", "michel", "fisher", "fisher-rearranged"),
        *("taylor-vector", "taylor-first", "taylor-second", "taylor-mixed", "policy", "random"),
    ),
    "allocation": (
        *("uniform", "global", "ranked", "alpha", "influence", "levels", "besa", "kwon"),
        *("spdy", "level-swaps", "evolution", "rl-pruner", "segments"),
    ),
    "reconstruct": (
        *("none", "bias", "mask-tuning", "rotation", "rotation-scaled", "admm", "liar"),
    ),
    "bias": ("auto", "always", "never"),
    "target_signal": ("local", "dense", "stream"),
    "statistics": ("sequential", "oneshot"),
    "depth": (
        *("reverse", "shortgpt", "streamline", "angular", "perplexity", "perplexity-greedy"),
        *("taylor", "magnitude-l1", "magnitude-l2", "random"),
    ),
    "span_repair": ("liar", "none"),
    "refit": ("pruned", "all"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "preset": ("best", "fast"),
    "hidden_states": ("auto", "device", "host", "disk"),
}


def _named(field: str) -> str:
    return ", ".join(NAMES[field])


# of the Recipe
OPTIONS: Options = {
    "sparsity": (
        float,
        "F",
        "fraction of the targeted budget to remove (default 0.3, and 0 where layers are left out)",
    ),
    "budget": (str, "WHAT", f"what --sparsity counts: {_named('budget')}"),
    "latency": (str, "FILE", "for --budget latency: what `liar bench latency` measured"),
    "target": (str, "KINDS", "ffn, heads, or ffn,heads"),
    "criterion": (
        str,
        "NAME",
        f"what to keep: {_named('criterion')}",
    ),
    "allocation": (
        str,
        "NAME",
        "how many where: uniform, global, ranked, alpha, influence, levels, besa, kwon, or by "
        "trying models: spdy, level-swaps, evolution, rl-pruner, segments",
    ),
    "reconstruct": (
        str,
        "NAME",
        f"how to repair: {_named('reconstruct')}",
    ),
    "calibration": (str, "TEXT", ".txt, .jsonl, .csv, tokens (.npy, .safetensors), datasets name"),
    "samples": (int, "N", "windows (decoders) or sentences (encoders)"),
    "seq_len": (int, "N", "tokens of each at most"),
    "batch_size": (int, "N", "sequences at a time"),
    "gradient_samples": (int, "N", "windows that criteria which need a loss take gradients of"),
    "policy_steps": (int, "N", "steps in which --criterion policy learns"),
    "search_samples": (int, "N", "windows that searching allocations compare models on"),
    "search_evaluations": (int, "N", "models that they try"),
    "ridge": (ridge, "F", "λ relative to the mean variance of a Site's columns, or auto"),
    "bias": (str, "WHEN", f"may the repair add biases: {_named('bias')}"),
    "target_signal": (
        str,
        "NAME",
        "what the repair aims at: local (the dense consumer on present inputs), dense (its "
        "output in the dense model) or stream (the residual stream behind it there)",
    ),
    "statistics": (str, "NAME", "sequential (inputs from the pruned path) or oneshot"),
    "round_to": (
        round_to,
        "N",
        "FFN widths become multiples of N; auto: of what such a device likes (less in narrow "
        "models), or a file that `liar bench align` wrote",
    ),
    "empty": (
        bool,
        "",
        "Sites may lose all their units, and layers with it their attention or FFN",
    ),
    "layers": (str, "A:B", "prune layers A to B-1 only"),
    "depth": (
        str,
        "NAME",
        f"how layers are chosen that are left out: {_named('depth')}",
    ),
    "drop": (int, "N", "how many, for --depth"),
    "drop_layers": (
        str,
        "LIST",
        "these layers instead, counted from 0: 20-27, or 3,7. Without any other option of the "
        "recipe nothing is repaired, and tensors go from file to file",
    ),
    "span_repair": (
        str,
        "NAME",
        "what stands in for left-out layers: liar (least squares, folded into the consumer in "
        "front of them), none",
    ),
    "refit": (
        str,
        "WHICH",
        "consumers that are fitted: pruned, those that lose columns or stand in for layers; or "
        "all behind the first of these, to the dense model's path",
    ),
    "device": (str, "NAME", _named("device")),
    "dtype": (str, "NAME", _named("dtype")),
    "seed": (int, "N", "of calibration sampling and random methods"),
}


def add_recipe_options(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """All Recipe fields but some, and `--recipe FILE` to start from a file."""
    from dataclasses import fields

    from liar_ext.presets import PRESETS
    from liar_ext.recipe import Recipe

    defaults = {field.name: field.default for field in fields(Recipe)}
    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", metavar="FILE", help="start from a recipe.json; options win")
    known = "; ".join(f"{name}, {preset.summary}" for name, preset in PRESETS.items())
    group.add_argument(
        "--preset", metavar="NAME", help=f"start from a preset; options win. {known}"
    )
    for name, (kind, metavar, text) in OPTIONS.items():
        if name in without:
            continue
        default = defaults[name]
        if kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(f"--{name}", action=action, default=None, help=text)
            continue
        shown = ",".join(default) if isinstance(default, tuple) else default
        suffix = "" if default is None else f" (default {shown})"
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text + suffix
        )


def recipe_of(arguments: argparse.Namespace, instead: Mapping[str, Any] | None = None) -> Any:
    """The Recipe: a file's or a preset's values, if any, under the options that were given.

    A preset looks at the config of `arguments.source`, and at fields that something else will come
    `instead` of, as in a grid.
    """
    from liar_ext.presets import fields_for
    from liar_ext.recipe import Recipe

    values = values_of(arguments)
    if arguments.preset is not None:
        trace = getattr(arguments, "trace", False)
        seen = {**values, **(instead or {})}
        under = fields_for(arguments.preset, arguments.source, seen, trace=trace)
        values = {**under, **values}
    return Recipe.from_json(values, "recipe") if arguments.recipe else Recipe(**values)


def drops_alone(arguments: argparse.Namespace) -> bool:
    """Whether nothing but `--drop-layers` is asked for of the model: a copy without them."""
    own = [name for name in OPTIONS if name != "drop_layers"]
    return arguments.drop_layers is not None and all(
        getattr(arguments, name, None) in (None, False)
        for name in (*own, "preset", "recipe", "resume", "trace", "moments")
    )


def planned_recipe(arguments: argparse.Namespace) -> Any:
    """`recipe_of` for a plan: `--drop-layers` alone repairs nothing."""
    recipe = recipe_of(arguments)
    return replace(recipe, span_repair="none") if drops_alone(arguments) else recipe


def values_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Recipe fields of `--recipe` and of the options that were given, these on top."""
    from liar_ext.recipe import Recipe

    values: dict[str, Any] = {}
    if arguments.recipe is not None:
        if arguments.preset is not None:
            raise InputError(
                f"--preset {arguments.preset} with --recipe {arguments.recipe}: both say where to "
                "start; give one of them"
            )
        values = Recipe.read(arguments.recipe).to_json()
    for name in OPTIONS:
        given = getattr(arguments, name, None)
        if given is not None:
            values[name] = _parsed(name, given)
    if isinstance(values.get("round_to"), str):
        values["round_to"] = _multiple(values, arguments)
    return values


def _multiple(values: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """What `--round-to auto`, or a file, is for the model at hand: a recipe has the number."""
    from liar_ext.alignment import round_to_for

    word, source = values["round_to"], getattr(arguments, "source", None)
    if source is None:
        raise InputError(f"--round-to {word}: jobs have models of their own; give a number")
    trace = getattr(arguments, "trace", False)
    found = round_to_for(word, source, values.get("device", "auto"), trace=trace)
    print(f"--round-to {word}: multiples of {found}", file=sys.stderr)
    return found


def _parsed(name: str, value: Any) -> Any:
    if name == "target":
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if name == "drop_layers":
        from liar_ext.depth.methods import parse_layers

        return parse_layers(value)
    if name == "layers":
        start, colon, stop = value.partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal()):
            raise InputError(f"--layers {value}: must be START:STOP, e.g. 4:28")
        return int(start), int(stop)
    return value
