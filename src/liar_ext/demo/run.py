"""`liar demo`: prune the demo model in six ways, measure, save, reload with stock transformers."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from liar_ext.cli.output import print_table
from liar_ext.demo import CALIBRATION, HELDOUT, MODEL
from liar_ext.engine.compress import compress
from liar_ext.engine.inputs import load_tokenizer
from liar_ext.environment import environment
from liar_ext.evaluation.generation import greedy
from liar_ext.evaluation.perplexity import perplexity, tokenize
from liar_ext.recipe import Recipe

SPARSITIES = (0.3, 0.5)
RECONSTRUCTIONS = ("none", "bias", "liar")
SEQ_LEN = 256
CALIBRATION_WINDOWS = 128
# part of the held-out text: the demo is to end well within two minutes on two cores
HELDOUT_WINDOWS = 64
PROMPT = "Return a new list"
NEW_TOKENS = 24


def demo(out: Path | None, *, silent: bool = False, progress: bool = True) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: keep the pruned folders here; None uses a temporary folder.
        silent: print nothing (the caller prints the result as JSON); progress: say what is done.
    Returns:
        rows with reconstruction, sparsity, perplexity, parameters, bytes, seconds; generated text.
    """
    started = time.perf_counter()
    progress = progress and not silent
    console = Console(quiet=silent, highlight=False)
    tokenizer = load_tokenizer(MODEL)
    tokens = tokenize(HELDOUT.read_text(encoding="utf-8"), tokenizer)
    tokens = tokens[: HELDOUT_WINDOWS * SEQ_LEN]
    if progress:
        console.print(f"dense: {MODEL}", soft_wrap=True)
    dense = _stock(MODEL)
    rows = [_row("dense", 0.0, dense, MODEL, tokens, None)]
    with tempfile.TemporaryDirectory(prefix="liar-demo-") as temporary:
        base = Path(temporary) if out is None else out
        for sparsity in SPARSITIES:
            for name in RECONSTRUCTIONS:
                recipe = Recipe(
                    sparsity=sparsity,
                    reconstruct=name,
                    calibration=str(CALIBRATION),
                    samples=CALIBRATION_WINDOWS,
                    seq_len=SEQ_LEN,
                    batch_size=16,
                )
                folder = base / f"{name}-{sparsity:.0%}".replace("%", "")
                report = compress(MODEL, folder, recipe, overwrite=True)
                # stock transformers, no code of ours
                model = _stock(folder)
                rows.append(_row(name, sparsity, model, folder, tokens, report.seconds["total"]))
                if progress:
                    console.print(
                        f"{name:5s} {sparsity:.0%}: perplexity {rows[-1]['perplexity']:.2f} "
                        f"in {report.seconds['total']:.1f} s"
                    )
        texts = {
            "dense": greedy(dense, tokenizer, PROMPT, NEW_TOKENS),
            f"{name} {sparsity:.0%}": greedy(model, tokenizer, PROMPT, NEW_TOKENS),
        }
    seconds = time.perf_counter() - started
    if not silent:
        print_table(_table(rows))
    for who, text in texts.items():
        console.print(f"{who}: {PROMPT}{text}".replace("\n", " "), markup=False)
    if out is not None:
        console.print(f"kept: {out}")
    console.print(f"done in {seconds:.0f} s")
    return {
        "rows": rows,
        "prompt": PROMPT,
        "generated": texts,
        "seconds": seconds,
        "environment": environment(torch.device("cpu")),
    }


def _stock(folder: Path) -> PreTrainedModel:
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _row(
    name: str,
    sparsity: float,
    model: PreTrainedModel,
    folder: Path,
    tokens: Tensor,
    seconds: float | None,
) -> dict[str, Any]:
    measured = perplexity(model, tokens, SEQ_LEN, batch_size=16)
    return {
        "reconstruct": name,
        "sparsity": sparsity,
        "perplexity": measured.perplexity,
        "loss": measured.loss,
        "loss_standard_error": measured.standard_error,
        "parameters": model.num_parameters(),
        "bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "evaluation_seconds": measured.seconds,
        "compression_seconds": seconds,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="FFN neurons removed, criterion wanda; perplexity on held-out text",
        title_justify="left",
    )
    table.add_column("repair")
    for name in ("FFN removed", "perplexity", "parameters", "bytes", "compressed in"):
        table.add_column(name, justify="right")
    for index, row in enumerate(rows):
        took = row["compression_seconds"]
        table.add_row(
            row["reconstruct"],
            f"{row['sparsity']:.0%}" if row["sparsity"] else "",
            f"{row['perplexity']:.2f}",
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
            "" if took is None else f"{took:.1f} s",
            end_section=index in (0, len(RECONSTRUCTIONS)),
        )
    return table
