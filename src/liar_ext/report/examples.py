"""Examples: what the dense model and its outputs say to the same prompts, differences marked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liar_ext.errors import InputError
from liar_ext.evaluation.task import ENCODER
from liar_ext.report.outputs import Output
from liar_ext.report.page import Html, element, join, paragraph

if TYPE_CHECKING:
    import torch

DENSE = "dense"
MOST_PROMPTS = 12
NEW_TOKENS = 48


@dataclass(frozen=True)
class Example:
    """One prompt. Attributes: `said`, by model, what it goes on with; the dense one's is first."""

    prompt: str
    said: dict[str, str]


@dataclass(frozen=True)
class Examples:
    """Attributes: `how`, in words; `decoder`, whether texts are continuations."""

    items: list[Example]
    how: str
    decoder: bool = True
    agreements: dict[str, float] = field(default_factory=dict)


def read_prompts(path: str | Path) -> list[str]:
    """A prompt a line; empty lines are skipped. Raises InputError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {path}: cannot be read ({error})") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise InputError(f"--prompts {path}: is empty; give a prompt a line")
    return found


def generate(
    dense: str | Path,
    outputs: Sequence[Output],
    prompts: Sequence[str],
    *,
    new_tokens: int = NEW_TOKENS,
    device: str = "auto",
) -> Examples:
    """What each model says, one model in memory at a time.

    Decoders continue each prompt greedily, so that nothing is left to chance. Encoders name the
    nearest of the other prompts, by the cosine of mean-pooled embeddings.

    Args:
        dense: folder or hub id of what the outputs were made from.
        prompts: the first 12 are shown; encoders look for neighbours among all of them.
        new_tokens: of decoders, tokens at most.
    Raises:
        InputError: no prompt, a model without a tokenizer, fewer than three sentences for an
            encoder, or models of both kinds.
    """
    from liar_ext.checkpoint.load import resolve
    from liar_ext.engine.inputs import resolve_device
    from liar_ext.evaluation.limits import limits_of

    if not prompts:
        raise InputError("--prompt: give at least one")
    if new_tokens < 1:
        raise InputError(f"--new-tokens {new_tokens}: must be at least 1")
    where = resolve_device(device)
    folders: dict[str, Path] = {DENSE: resolve(dense)}
    folders |= {o.label: o.folder for o in outputs if o.folder is not None}
    kinds = {name: limits_of(folder).kind for name, folder in folders.items()}
    if len(set(kinds.values())) > 1:
        odd = next(name for name, kind in kinds.items() if kind != kinds[DENSE])
        raise InputError(f"--dense {dense}: {odd} is no model of the same kind")
    if kinds[DENSE] != ENCODER:
        return _continued(folders, prompts, new_tokens, where)
    return _nearest(folders, prompts, where)


def _loaded(folder: Path, where: torch.device) -> tuple[Any, Any]:
    from liar_ext.checkpoint.load import load
    from liar_ext.engine.inputs import compute_dtype, load_tokenizer

    tokenizer = load_tokenizer(folder)
    return load(folder, dtype=compute_dtype("auto", where), device=where), tokenizer


def _continued(
    folders: dict[str, Path], prompts: Sequence[str], new_tokens: int, where: torch.device
) -> Examples:
    from liar_ext.evaluation.generation import greedy

    shown = list(prompts)[:MOST_PROMPTS]
    said: list[dict[str, str]] = [{} for _ in shown]
    for name, folder in folders.items():
        model, tokenizer = _loaded(folder, where)
        for prompt, own in zip(shown, said, strict=True):
            own[name] = greedy(model, tokenizer, prompt, new_tokens)
        del model
    items = [Example(prompt, own) for prompt, own in zip(shown, said, strict=True)]
    how = f"Greedy continuation, {new_tokens} tokens at most: no sampling, so no seed."
    if len(prompts) > len(shown):
        how += f" The first {len(shown)} of {len(prompts)} prompts."
    return Examples(items, how)


def _nearest(folders: dict[str, Path], prompts: Sequence[str], where: torch.device) -> Examples:
    import torch

    from liar_ext.evaluation.stsb import embed

    sentences = list(dict.fromkeys(prompts))
    if len(sentences) < 3:
        raise InputError("--prompts: an encoder needs three different sentences or more")
    near: dict[str, list[tuple[int, float]]] = {}
    for name, folder in folders.items():
        model, tokenizer = _loaded(folder, where)
        vectors = embed(model, tokenizer, sentences, 32, 256)
        unit = torch.nn.functional.normalize(vectors, dim=1)
        cosine = (unit @ unit.T).fill_diagonal_(-2.0)
        best = cosine.max(dim=1)
        near[name] = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        del model
    items = [
        Example(
            sentence,
            {name: f"{sentences[f[at][0]]} ({f[at][1]:.3f})" for name, f in near.items()},
        )
        for at, sentence in enumerate(sentences[:MOST_PROMPTS])
    ]
    same = {
        name: sum(a[0] == b[0] for a, b in zip(found, near[DENSE], strict=True)) / len(sentences)
        for name, found in near.items()
        if name != DENSE
    }
    how = (
        f"The nearest of {len(sentences)} sentences by the cosine (in brackets) of mean-pooled "
        "embeddings."
    )
    return Examples(items, how, decoder=False, agreements=same)


def section(examples: Examples) -> Html:
    """The prompts, and under each what the models say, side by side."""
    parts: list[str] = [
        paragraph(f"{examples.how} Words that the dense model does not have there are marked.")
    ]
    if examples.agreements:
        told = ", ".join(f"{name} {share:.0%}" for name, share in examples.agreements.items())
        parts.append(paragraph(f"The same nearest sentence as the dense model: {told}."))
    for item in examples.items:
        dense = item.said[DENSE].strip()
        columns = []
        for name, said in item.said.items():
            words = said.strip()
            body = element("p", words) if name == DENSE else element("p", marked(dense, words))
            note = "" if name == DENSE else f" · {_kept(dense, words)}"
            columns.append(
                element("div", join([element("span", f"{name}{note}", class_="soft"), body]))
            )
        parts.append(element("p", item.prompt, class_="prompt"))
        parts.append(element("div", join(columns), class_="examples"))
    return join(parts)


def marked(dense: str, other: str) -> Html:
    """`other`, with the words in `<mark>` that `dense` does not have in that order."""
    mine, theirs = _words(dense), _words(other)
    matcher = difflib.SequenceMatcher(a=mine, b=theirs, autojunk=False)
    parts: list[str] = []
    for tag, _, _, start, stop in matcher.get_opcodes():
        piece = "".join(theirs[start:stop])
        if piece:
            parts.append(piece if tag == "equal" or not piece.strip() else element("mark", piece))
    return join(parts, "")


def _kept(dense: str, other: str) -> str:
    """How far the two are the same."""
    if dense == other:
        return "the same"
    mine, theirs = dense.split(), other.split()
    first = next(
        (at for at, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b),
        min(len(mine), len(theirs)),
    )
    if not first:
        return "differs from the first word"
    return f"the first {first} words are the same" if first > 1 else "the first word is the same"


def _words(text: str) -> list[str]:
    """Words and what is between them, so that they join to the text again."""
    return re.findall(r"\s+|[^\s]+", text)
