"""What completion offers beside the recipe's names is what the commands take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from liar_ext.bench import serve_lanes
from liar_ext.cli import build_parser, export
from liar_ext.cli.completion import OWN
from liar_ext.cli.options import NAMES
from liar_ext.cli.parser import leaf_of
from liar_ext.convolution import settings as fuse
from liar_ext.depth import merge_settings, merge_subject, methods
from liar_ext.depth.grow import mlp, predictors
from liar_ext.depth.replace import settings as replace
from liar_ext.export import gguf, widths
from liar_ext.recovery import settings as recover

KNOWN = {
    "merge": {
        **{name: merge_settings.CHOICES[name] for name in ("rule", "norms", "similarity")},
        "weights": merge_subject.WEIGHTS,
    },
    "fuse": {"repair": fuse.REPAIRS, "importance": fuse.IMPORTANCES},
    "recover": {"method": recover.METHODS, "ranks": recover.RANKS},
    "replace": {
        name: replace.CHOICES[name] for name in ("network", "loss", "loss_tokens", "init", "keep")
    },
    "grow": {"predictor": predictors.PREDICTORS, "hyper_parameters": mlp.HYPER_PARAMETERS},
    "layers": {"measures": methods.MEASURES},
    "compare": {
        "criteria": NAMES["criterion"],
        "allocations": NAMES["allocation"],
        "reconstructions": NAMES["reconstruct"],
        "target_signals": NAMES["target_signal"],
    },
    "export": {"format": export.FORMATS, "to": widths.TARGETS, "outtype": gguf.TYPES},
    "bench serve": {"mode": serve_lanes.MODES},
}


def test_the_names_of_each_command_are_those_of_its_registries():
    assert _sets(OWN) == _sets(KNOWN)


def test_every_name_is_of_an_option_that_its_command_has():
    for command, own in OWN.items():
        words = command.split()
        leaf = leaf_of(build_parser(words), words)
        assert set(own) <= {action.dest for action in leaf._actions}, command


def _sets(known: Mapping[str, Mapping[str, Iterable[str]]]) -> dict[str, dict[str, set[str]]]:
    return {of: {name: set(some) for name, some in own.items()} for of, own in known.items()}
