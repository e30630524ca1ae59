"""`liar report DIR`: one HTML file with everything inside, from the reports of output folders."""

from __future__ import annotations

import os
import string
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from liar_ext._version import __version__
from liar_ext.errors import InputError
from liar_ext.report import examples, others, overview, pruned, quality, remaining, serving
from liar_ext.report.material import Material
from liar_ext.report.outputs import Output, read
from liar_ext.report.page import (
    Html,
    Section,
    contents,
    details,
    element,
    join,
    listing,
    text,
)
from liar_ext.report.schema import Report

FILE = "report.html"


def write(
    folders: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    material: Material | None = None,
) -> Path:
    """Render the reports of output folders into a file, complete or not at all.

    Args:
        folders: one or several that liar-ext has written.
        out: the file to write; None is `report.html` in the first folder.
        material: what is shown beside them.
    Returns:
        the file written.
    Raises:
        InputError: no report in a folder, a malformed evaluation, or `out` cannot be written.
    """
    places = [folders] if isinstance(folders, str | Path) else list(folders)
    page = render(read(places), material)
    path = Path(places[0]) / FILE if out is None else Path(out)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        # mkstemp makes it private; the result gets what a plain open would have given
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def render(outputs: Sequence[Output] | Report, material: Material | None = None) -> str:
    """The page: inline styles and SVG, no script, nothing loaded from elsewhere.

    Args:
        outputs: what it is about, the first one first; a Report stands for itself.
        material: what is shown beside them.
    Raises:
        InputError: an evaluation lacks its source, metric or value.
    """
    if isinstance(outputs, Report):
        outputs = [Output(None, "out", outputs.to_json(), outputs)]
    material = material or Material()
    rows = quality.rows_of(material.evaluations, outputs)
    sections = _sections(outputs, material, rows)
    title = overview.title_of(outputs)
    main = join([overview.warnings(outputs), *(section.html() for section in sections)])
    body = join(
        [
            overview.header(title, outputs, material, rows),
            contents(sections),
            element("main", main, id="content"),
            element(
                "footer",
                f"Made by liar-ext {__version__} from {len(outputs)} "
                f"liar_report.json file{'s' * (len(outputs) > 1)}. Nothing on this page is loaded "
                "from elsewhere; absolute paths are cut to their last part.",
            ),
        ]
    )
    template = resources.files("liar_ext.report").joinpath("template.html").read_text("utf-8")
    return string.Template(template).substitute(
        title=text(f"{title}: compression report"), body=body
    )


def _sections(
    outputs: Sequence[Output], material: Material, rows: Sequence[quality.Row]
) -> list[Section]:
    found: list[Section] = []
    if len(outputs) > 1:
        found.append(Section("outputs", "Side by side", overview.side_by_side(outputs, rows)))
    if rows:
        found.append(Section("quality", "Quality", quality.evaluated(rows, outputs)))
    if material.comparisons:
        grids = join(quality.grid(c, at) for at, c in enumerate(material.comparisons))
        found.append(Section("grid", "Methods compared", grids, "Methods"))
    if material.serves:
        body = serving.measured(material.serves, outputs)
        found.append(Section("serving", "Speed and memory", body, "Speed"))
    if material.examples is not None:
        body = examples.section(material.examples)
        what = "What they say" if material.examples.decoder else "Nearest sentences"
        found.append(Section("examples", what, body, "Examples"))
    if len(outputs) == 1:
        body = _happened(outputs[0], "happened")
        found.append(Section("happened", "What was done", body))
    else:
        inside = [
            details(
                f"{output.label}: {output.done()}",
                _happened(output, f"happened-{at}"),
                opened=at == 0,
            )
            for at, output in enumerate(outputs)
        ]
        found.append(Section("happened", "What was done", join(inside)))
    if missing := remaining.missing(outputs, material, rows):
        body = listing(missing, class_="todo")
        found.append(Section("missing", "What is not known here", body, "Not measured"))
    found.append(Section("repeat", "How to repeat it", remaining.repeat(outputs), "Repeat"))
    return found


def _happened(output: Output, name: str) -> Html:
    if output.report is not None:
        return pruned.happened(output.report, name)
    try:
        return others.happened(output, name)
    except KeyError as error:
        raise output.lacks(error) from error


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"--out {path}: cannot be written ({error.strerror}); give another file")
