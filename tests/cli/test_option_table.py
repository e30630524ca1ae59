"""Tables of options: what a user may write, and what is taken as given."""

from __future__ import annotations

import argparse

import pytest

from liar_ext.cli.option_table import add_options, given_of

TABLE = {
    "batch_size": (int, "N", "at a time"),
    "lr": (float, "F", "learning rate"),
    "device": (str, "NAME", "auto, cpu"),
}


def _parsed(*words: str, **how) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser.add_argument_group("some"), TABLE, **how)
    parser.add_argument("--untie", action="store_true")
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], {}),
        (["--batch-size", "0", "--lr", "0"], {"batch_size": 0, "lr": 0.0}),
        (["--device", ""], {"device": ""}),
        (["--untie", "--batch-size", "3"], {"batch_size": 3, "untie": True}),
    ],
)
def test_what_was_given_has_its_type_and_zero_counts(words, given):
    assert given_of(_parsed(*words), [*TABLE, "untie"]) == given


def test_names_may_have_a_prefix_and_may_be_required(capsys):
    found = _parsed("--trial-batch-size", "2", prefix="trial_")
    assert given_of(found, ["trial_batch_size", "trial_lr"]) == {"trial_batch_size": 2}
    with pytest.raises(SystemExit):
        _parsed("--lr", "1", required=("batch_size",))
    assert "the following arguments are required: --batch-size" in capsys.readouterr().err
