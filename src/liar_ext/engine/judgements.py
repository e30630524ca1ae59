"""Judgements: what criteria said of Sites, for compressions of one model that ask again.

Neither the reconstruction nor, for scores, the sparsity shows in what a criterion is asked on the
dense path. Greedy selections cost as much as repairs, so a grid judges each Site once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from hashlib import sha256

import torch
from torch import Tensor

from liar_ext.criteria import CRITERIA, Criterion, Evidence
from liar_ext.engine.execution import free_bytes
from liar_ext.engine.level_store import HeldLevels
from liar_ext.recipe import Recipe

# a Site and its statistics are in the key by what they hold; notes are what comes out
_APART = ("site", "measured", "generator", "notes", "remarks")
# in a recipe: what is searched for and how, on which levels do not depend
_SEARCH = ("allocation", "search_samples", "search_evaluations")
_BUDGET = ("sparsity", "budget", "latency")
_PLAIN = (bool, int, float, str, type(None))


class Judgements:
    """Remembers; one object for any number of compressions of the same weights.

    A judgement is given again to the bit: with the same evidence, a random generator's state
    included, which is then left as the judgement left it.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[Tensor, list[list[str]], Tensor]] = {}
        # those that were asked for last at the end
        self._levels: dict[str, HeldLevels] = {}

    def of(self, criterion: Criterion, *, choices: bool) -> Criterion:
        """The criterion, asked once for each evidence.

        Args:
            choices: remember what to keep as well as scores for an allocation; of use where the
                statistics are those of the dense path, elsewhere nobody asks again.
        """
        score = self._once(criterion.name, "score", criterion.score, choices)
        choose = criterion.choose
        if choices:
            choose = self._once(criterion.name, "choose", criterion.select, choices)
        return replace(criterion, score=score, choose=choose)

    def levels(self, recipe: Recipe, needed: int) -> HeldLevels:
        """Those of a search, with what an earlier one made.

        Args:
            needed: bytes of all of them; the ones that were not asked for longest make room.
        """
        # keep probabilities are learnt for a budget
        policy = CRITERIA[recipe.criterion].needs == "policy"
        apart = _SEARCH if policy else (*_SEARCH, *_BUDGET)
        key = {name: value for name, value in recipe.to_json().items() if name not in apart}
        name = json.dumps(key, sort_keys=True)
        found = self._levels.pop(name, None) or HeldLevels()
        while self._levels and needed > free_bytes(torch.device("cpu")) + found.bytes:
            del self._levels[next(iter(self._levels))]
        self._levels[name] = found
        return found

    def _once(
        self, name: str, what: str, judge: Callable[[Evidence], Tensor], choices: bool
    ) -> Callable[[Evidence], Tensor]:
        def judged(evidence: Evidence) -> Tensor:
            key = _key(evidence) if choices or evidence.keep is None else None
            if key is None:
                return judge(evidence)
            key = (name, what, *key)
            if key not in self._known:
                said = evidence.notes, evidence.remarks
                before = [len(lines) for lines in said]
                result = judge(evidence)
                state = evidence.generator.get_state()
                new = [lines[n:] for lines, n in zip(said, before, strict=True)]
                self._known[key] = result.clone(), new, state
                return result
            result, (notes, remarks), state = self._known[key]
            evidence.notes.extend(notes)
            evidence.remarks.extend(remarks)
            evidence.generator.set_state(state)
            return result.clone()

        return judged


def _key(evidence: Evidence) -> tuple[object, ...] | None:
    """All that a judgement depends on; None if it holds what cannot be compared."""
    rest = [getattr(evidence, f.name) for f in fields(evidence) if f.name not in _APART]
    if not all(isinstance(value, _PLAIN) for value in rest):
        return None
    site, measured = evidence.site, evidence.measured
    data = sha256(type(measured).__name__.encode())
    seen = [] if measured is None else [measured.mean(), measured.diagonal()]
    for tensor in (*seen, evidence.generator.get_state()):
        own = tensor.detach().to("cpu").contiguous()
        data.update(own.view(torch.uint8).numpy().tobytes())
    return (site.layer, site.kind, site.units, *rest, data.hexdigest())
