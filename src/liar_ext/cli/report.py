"""`liar report DIR [DIR ...]`: one self-contained HTML page about what was made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from liar_ext.errors import InputError, unknown_choice

DESCRIPTION = """Make one HTML page from folders that liar-ext wrote: what was done to each layer,
and what was measured of the result. It loads nothing and needs no network, so it can be sent to
others; absolute paths are cut to their last part. What is not measured is said on the page, with
the command that measures it."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="one HTML page about one or several outputs", description=DESCRIPTION
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folders that liar-ext wrote")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the first DIR")
    group = parser.add_argument_group("what is shown beside them; each may be given several times")
    for flags, metavar, text in (
        (("--eval", "--evaluation"), "FILE.json", "what `liar eval --json` printed, of any model"),
        (("--compare",), "FILE.json", "comparison.json of `liar compare`, or its folder"),
        (("--serve",), "FILE.json", "what `liar bench serve --json FILE` wrote"),
    ):
        group.add_argument(
            *flags, action="append", default=[], metavar=metavar, help=text, dest=flags[0][2:]
        )
    group = parser.add_argument_group("examples: what the dense model says, and the outputs")
    group.add_argument(
        "--dense", metavar="SRC", help="what they were made from (default: what the report names)"
    )
    group.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="to go on with, greedily"
    )
    group.add_argument(
        "--prompts",
        metavar="FILE.txt",
        help="a prompt a line; of an encoder, sentences that are looked for among each other",
    )
    group.add_argument("--new-tokens", type=int, default=48, metavar="N", help="default 48")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from liar_ext.recipe import CHOICES
    from liar_ext.report import html
    from liar_ext.report.material import Material, read_comparison, read_evaluations, read_serve
    from liar_ext.report.outputs import read

    if arguments.device not in CHOICES["device"]:
        raise unknown_choice("--device", arguments.device, CHOICES["device"])
    # what can be refused is, before a model is read
    outputs = read(arguments.folders)
    material = Material(
        evaluations=[one for path in arguments.eval for one in read_evaluations(path)],
        comparisons=[read_comparison(path) for path in arguments.compare],
        serves=[read_serve(path) for path in arguments.serve],
        examples=_examples(arguments, outputs),
    )
    out = Path(arguments.out) if arguments.out else None
    print(f"written: {html.write(arguments.folders, out, material)}")


def _examples(arguments: argparse.Namespace, outputs: Any) -> Any:
    """None where no prompt was given."""
    from liar_ext.report.examples import generate, read_prompts

    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        prompts += read_prompts(arguments.prompts)
    if not prompts:
        if arguments.dense is not None:
            raise InputError(
                f"--dense {arguments.dense}: is for examples; give --prompt TEXT or --prompts FILE"
            )
        return None
    dense = arguments.dense
    if dense is None:
        dense = outputs[0].source
        if not Path(dense).is_dir():
            raise InputError(
                f"--prompt: the model before, {dense}, is no folder here; give --dense SRC"
            )
    return generate(
        dense, outputs, prompts, new_tokens=arguments.new_tokens, device=arguments.device
    )
