"""The end of the page: what is not known, with the commands that find out, and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from liar_ext.evaluation.task import ENCODER, ENCODER_DECODER
from liar_ext.report import commands, quality
from liar_ext.report.material import Material
from liar_ext.report.outputs import Output
from liar_ext.report.page import Html, code, details, element, join, paragraph, table
from liar_ext.report.schema import CONVOLUTIONS


def missing(
    outputs: Sequence[Output], material: Material, rows: Sequence[quality.Row]
) -> list[Html]:
    """What was not measured, and the command that would."""
    # a convolutional network has its accuracy and its time in its own report
    own = [output for output in outputs if output.kind != CONVOLUTIONS]
    first = (own or outputs)[0]
    source = commands.from_here(first.source)
    # what was measured of others; the key has the data set as it was given
    kind, data = (rows[0].kind, rows[0].key[1]) if rows else ("", "")
    page = ["report", *map(_place, outputs)]
    found: list[Html] = []

    def say(what: str, *lines: str) -> None:
        if any(commands.ELSEWHERE in line for line in lines) and not told:
            what += (
                f" For {commands.ELSEWHERE} give the folder: it is not below the one that this "
                "page was made in."
            )
            told.append(True)
        shown = element("pre", element("code", "\n".join(lines)), tabindex="0")
        found.append(join([element("span", what), shown], ""))

    told: list[bool] = []
    model = first.model_kind
    without = [o for o in own if not any(row.output is o for row in rows)]
    if without and (outputs[0].folder is not None or not rows):
        named = len(rows) > 0 or len(outputs) > 1
        whom = ", ".join(output.label for output in without) if named else "this model"
        files = [f"eval-{at}.json" for at in range(1, len(without) + 1)]
        if len(without) == 1:
            files = ["eval.json"]
        say(
            f"Quality of {whom} was not measured. Residuals are diagnostics on calibration tokens, "
            "not quality.",
            *(
                f"{commands.evaluate(_place(output), kind, data, model=model)} > {file}"
                for output, file in zip(without, files, strict=True)
            ),
            commands.command(*page, *(word for file in files for word in ("--eval", file))),
        )
    if own and not any(row.dense for row in rows) and (rows or not without):
        say(
            "How good the model was before is not known.",
            f"{commands.evaluate(source, kind, data, model=model)} > dense.json",
            commands.command(*page, "--eval", "dense.json"),
        )
    if own and not material.serves and model != ENCODER_DECODER:
        say(
            "Speed and memory in use were not measured. Fewer parameters are not always faster.",
            commands.command("bench", "serve", source, *map(_place, own), "--json", "serve.json"),
            commands.command(*page, "--serve", "serve.json"),
        )
    if own and material.examples is None:
        closes = model == ENCODER
        what = "which sentences the model finds close" if closes else "what the model writes"
        how = ("--prompts", "SENTENCES.txt") if closes else ("--prompt", "TEXT")
        say(f"Nothing here shows {what}.", commands.command(*page, "--dense", source, *how))
    found.append(
        Html(
            "Abilities that neither the calibration data nor an evaluation above exercises can be "
            "lost unnoticed: rare inputs, facts, other languages, following instructions, safety."
        )
    )
    return found


def _place(output: Output) -> str:
    """The folder, for a command; of a report in memory, what it is called."""
    return output.label if output.folder is None else commands.from_here(output.folder)


def repeat(outputs: Sequence[Output]) -> Html:
    parts: list[str] = []
    for output in outputs:
        if len(outputs) > 1:
            parts.append(element("h3", output.label))
        parts.append(element("pre", element("code", commands.repeat(output)), tabindex="0"))
    if any(output.report is not None for output in outputs):
        parts.append(
            paragraph(
                join(
                    [
                        "An output folder has every option in ",
                        code("recipe.json"),
                        ", which ",
                        code("--recipe"),
                        " takes, and every number of what was done in ",
                        code("liar_report.json"),
                        ".",
                    ],
                    "",
                )
            )
        )
    versions = outputs[0].environment
    stated = ", ".join(
        f"{name} {value}"
        for name, value in versions.items()
        if value is not None and name not in ("device", "threads", "platform")
    )
    sums = {
        name: value
        for output in outputs
        for name, value in output.data.get("source_files", {}).items()
    }
    parts.append(
        paragraph(f"Versions: {stated}; on {versions.get('device', 'an unknown device')}.")
    )
    if sums:
        rows = [[name, value] for name, value in sums.items()]
        parts.append(
            details(
                "Weight files that it was made from",
                table(
                    "SHA-256 of the source's files.", ["file", "sha256"], rows, words=("sha256",)
                ),
            )
        )
    return join(parts)
