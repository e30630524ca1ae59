"""Compressions killed at any moment and resumed: is the result always the same, byte for byte?

    python benchmarks/faults.py [--kills 60] [--interrupts 20] [--seed 0] [--json FILE]

A LLaMA of random weights with 8 layers, under several recipes. `kill -9` comes at a random moment,
in the middle of whatever the process does; the run is resumed, perhaps killed again, until it is
complete, and its folder is compared with that of a run without a break. `--interrupts` are SIGTERM
and SIGINT to the command line, which has to say what it kept or leave nothing. Exits with 1 if
anything differs or is left behind.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from liar_ext import Recipe
from liar_ext.engine.execution import Execution
from liar_ext.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import liar_kill

# chance that a resumed run is hit again
AGAIN = 0.6
# recipe, where hidden states wait, seconds between journal entries, an output is replaced
CONFIGURATIONS: tuple[tuple[dict[str, Any], str, float, bool], ...] = (
    ({"criterion": "wanda"}, "device", 0.0, False),
    ({"criterion": "random", "bias": "always"}, "disk", 0.0, False),
    ({"allocation": "global"}, "device", 0.0, True),
    ({"allocation": "global", "criterion": "flap"}, "disk", 0.1, False),
    ({"statistics": "oneshot"}, "disk", 0.0, True),
    ({"statistics": "oneshot", "allocation": "global"}, "device", 0.0, False),
    ({"reconstruct": "bias", "layers": (2, 7)}, "device", 0.0, False),
    ({"dtype": "bfloat16"}, "disk", 3600.0, True),
    ({"allocation": "evolution", "search_samples": 8, "search_evaluations": 12}, "disk", 0.0, True),
    ({"allocation": "level-swaps", "search_evaluations": 6}, "device", 0.1, False),
)


@dataclass
class Case:
    """One configuration.

    Attributes:
        whole: the result without a break, which took `seconds`.
        old: another result, for `work` that replaces one.
    """

    name: str
    work: liar_kill.Work
    whole: Path
    seconds: float
    old: Path
    kills: list[dict[str, Any]] = field(default_factory=list)
    runs: int = 0
    different: list[str] = field(default_factory=list)

    def begin(self) -> liar_kill.Work:
        """The work, with the output as it is before."""
        shutil.rmtree(self.work.out, ignore_errors=True)
        if self.work.overwrite:
            shutil.copytree(self.old, self.work.out)
        return self.work


def make_source(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1MB")
    return folder


def cases(root: Path, threads: int) -> Iterator[Case]:
    source, tokens = make_source(root / "dense"), root / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 512, (64, 128)))
    for number, (changes, place, seconds, overwrite) in enumerate(CONFIGURATIONS):
        values = {"target": ("ffn", "heads"), "sparsity": 0.4, "seq_len": 128, "samples": 64}
        recipe = Recipe(**{**values, "calibration": str(tokens), **changes})
        execution = Execution(hidden_states=place, journal_seconds=seconds)
        out = root / f"out-{number}"
        work = liar_kill.Work(source, out, recipe, execution, overwrite, threads)
        whole = replace(work, out=root / f"whole-{number}")
        end = liar_kill.compress(whole)
        assert end.done, end
        parts = [f"{key}={value}" for key, value in changes.items()]
        parts += [f"{place}, journal {seconds:g} s"]
        parts += ["replacing"] * overwrite
        old = root / f"whole-{max(number - 1, 0)}"
        yield Case(", ".join(parts), work, whole.out, end.seconds, old)


def trial(case: Case, chance: random.Random) -> None:
    """One compression, hit at least once if the moment is before its end."""
    work = case.begin()
    left = case.seconds
    while True:
        hit = work == case.work or chance.random() < AGAIN
        moment = chance.uniform(0, left) if hit else None
        end = liar_kill.compress(work, after=moment)
        case.runs += 1
        if not end.killed:
            break
        case.kills.append({"after": moment, "journal": end.journal})
        left = max(case.seconds - (moment or 0), 0.2 * case.seconds)
        work = work.resumed()
    if end.error is not None:
        case.different.append(f"{end.error[0]}: {end.error[1]}")
        return
    case.different += liar_kill.differences(case.whole, work.out)


def interrupt(case: Case, chance: random.Random) -> str:
    """A signal at any moment to the command line: what it said, in short."""
    work, number = case.begin(), chance.choice((signal.SIGTERM, signal.SIGINT))
    recipe = work.out.with_suffix(".json")
    recipe.write_text(json.dumps(work.recipe.to_json()))
    arguments = ["prune", str(work.source), "--out", str(work.out), "--recipe", str(recipe)]
    arguments += ["--hidden-states", work.execution.hidden_states]
    arguments += ["--journal-seconds", str(work.execution.journal_seconds)]
    arguments += ["--overwrite"] * work.overwrite
    moment = chance.uniform(0, case.seconds)
    # with as many threads as the run it is compared with: the report's last digits depend on them
    threads = functools.partial(torch.set_num_threads, work.threads)
    end = liar_kill.command(arguments, work.out, threads, after=moment, number=number)
    line, kept = end.error_line, work.job.folder.exists()
    if end.code == 0:
        said = "complete"
    elif end.killed:
        said = "before the command had begun"
    else:
        said = "kept" if "--resume goes on" in line else "nothing was written"
        if end.code != 2 or not line.startswith("error: interrupted"):
            case.different.append(f"exit code {end.code}: {line}")
    if kept != (said == "kept"):
        case.different.append(f"{said}, and {work.job.folder} is there: {kept}")
    liar_kill.resume(work)
    case.different += liar_kill.differences(case.whole, work.out)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="kill at least so many times")
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch in each process")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chance, started = random.Random(arguments.seed), time.perf_counter()
    said: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="liar-faults-") as folder:
        found = list(cases(Path(folder), arguments.threads))
        while sum(len(case.kills) for case in found) < arguments.kills:
            trial(min(found, key=lambda case: len(case.kills)), chance)
        for number in range(arguments.interrupts):
            said[interrupt(found[number % len(found)], chance)] += 1
    rows = [
        {
            "configuration": case.name,
            "seconds": round(case.seconds, 3),
            "kills": len(case.kills),
            "runs": case.runs,
            "hit": dict(sorted(Counter(str(kill["journal"]) for kill in case.kills).items())),
            "different": case.different,
        }
        for case in found
    ]
    for row in rows:
        same = "all the same" if not row["different"] else f"DIFFERENT: {row['different']}"
        print(f"{row['kills']:3} kills in {row['runs']:3} runs, {same}: {row['configuration']}")
    kills, wrong = sum(row["kills"] for row in rows), [r for r in rows if r["different"]]
    print(f"{kills} kills, {sum(said.values())} interrupts {dict(said)}")
    if arguments.json:
        data = {
            "kills": kills,
            "interrupts": dict(said),
            "identical": not wrong,
            "seed": arguments.seed,
            "threads": arguments.threads,
            "seconds": round(time.perf_counter() - started, 1),
            "rows": rows,
            "environment": environment(torch.device("cpu")),
            "load": os.getloadavg(),
        }
        arguments.json.write_text(json.dumps(data, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
