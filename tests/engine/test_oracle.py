"""The oracle of searches against whole models that are put together by hand."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from liar_families import FAMILIES, VOCABULARY

from liar_ext.allocation.search import TOGETHER
from liar_ext.calibration.batch import Batch
from liar_ext.engine.clock import Clock
from liar_ext.engine.ledger import SearchLedger
from liar_ext.engine.level_store import FiledLevels, HeldLevels, Level
from liar_ext.engine.oracle import ModelOracle
from liar_ext.engine.runtime import Runtime
from liar_ext.engine.shelf import DeviceShelf, DiskShelf
from liar_ext.engine.store import InMemory
from liar_ext.errors import InputError
from liar_ext.evaluation.mode import inference
from liar_ext.models import adapter_for, linear
from liar_ext.search_costs import STATES

CPU = torch.device("cpu")
# float64 throughout: sums of some hundred terms in another order
EXACT = 1e-10


def windows_of(padded, count=5, length=12):
    """Batches of two and a last one of one; the last two windows may be padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY - 1, (count, length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[-2:, length // 2 :] = False
    return tuple(Batch(i, m) for i, m in zip(ids.split(2), mask.split(2), strict=True))


class Noting(InMemory):
    """Notes the layers that are opened."""

    def __init__(self, model, opened):
        super().__init__(model)
        self.opened = opened

    def open(self, index):
        self.opened.append(index)


class Made:
    """A float64 model, random levels of its Sites, and an oracle on both."""

    def __init__(self, name, *, biased=False, shelf=None, levels=None, targets=None, padded=None):
        self.family = FAMILIES[name]
        self.model = self.family.build().double()
        self.adapter = adapter_for(self.model.config)
        self.windows = windows_of(not self.family.decoder if padded is None else padded)
        self.levels = levels or HeldLevels()
        self.generator = torch.Generator().manual_seed(11)
        self.made = {}
        self.sites = []
        layers = len(self.adapter.layer_list(self.model)[1])
        for index in targets or range(layers):
            for site in self.adapter.sites_of(self.model, index, ("ffn", "heads")):
                key = index, site.kind
                widths = [1, site.units // 2]
                own = {units: self._level(site, units, biased) for units in widths}
                for units, level in own.items():
                    self.levels.save(key, units, level)
                self.made[key] = own
                self.sites.append((key, site.units))
        self.opened = []
        self.prepared = 0
        self.oracle = ModelOracle(
            runtime=Runtime(
                Noting(self.model, self.opened), CPU, Clock(CPU), shelf=shelf or DeviceShelf()
            ),
            windows=self.windows,
            sites=self.sites,
            levels=self.levels,
            ledger=SearchLedger(None),
            prepare=self._prepare,
        )

    def _prepare(self):
        self.prepared += 1

    def _level(self, site, units, biased):
        keep = torch.randperm(site.units, generator=self.generator)[:units].sort().values
        columns = site.unit_columns(keep)
        noise = torch.randn(
            site.weight().shape[0], len(columns), generator=self.generator, dtype=torch.float64
        )
        bias = None
        if biased or site.bias() is not None:
            bias = torch.randn(
                site.weight().shape[0], generator=self.generator, dtype=torch.float64
            )
        return Level(keep, site.weight()[:, columns] + 0.1 * noise, bias)

    def assembled(self, candidate):
        """Dense shapes: what a unit that went would give meets a column of zeros."""
        model = copy.deepcopy(self.model)
        for (key, whole), units in zip(self.sites, candidate, strict=True):
            if units == whole:
                continue
            (site,) = self.adapter.sites_of(model, key[0], (key[1],))
            level = self.made[key][units]
            weight = torch.zeros_like(site.weight())
            weight[:, site.unit_columns(level.keep)] = level.weight
            linear.set_weight(site.consumer, weight)
            if level.bias is not None:
                linear.set_bias(site.consumer, level.bias)
        return model

    @torch.no_grad()
    def expected(self, candidate, count=None):
        model = self.assembled(candidate)
        above = below = 0.0
        left = count or 10**9
        for batch in self.windows:
            ids, mask = batch.input_ids[:left], batch.attention_mask[:left]
            left -= len(ids)
            if not len(ids):
                continue
            if self.family.decoder:
                dense, pruned = (
                    m(input_ids=ids, attention_mask=mask).logits[mask] for m in (self.model, model)
                )
                p, q = dense.log_softmax(-1), pruned.log_softmax(-1)
                above += float((p.exp() * (p - q)).sum())
                below += len(p)
            else:
                dense, pruned = (
                    self.adapter.backbone(m)[1](
                        input_ids=ids, attention_mask=mask
                    ).last_hidden_state[mask]
                    for m in (self.model, model)
                )
                above += float(F.mse_loss(pruned, dense, reduction="sum"))
                below += float(dense.square().sum())
        return above / below

    def losses(self, candidates, share=1.0):
        with inference(self.model):
            return self.oracle.losses(candidates, share)

    def candidates(self, count):
        options = [sorted({*self.made[key], whole}) for key, whole in self.sites]
        every = list(itertools.product(*options))
        order = torch.randperm(len(every), generator=self.generator)[:count].tolist()
        return [every[place] for place in order]


@pytest.mark.parametrize(
    "name", ["llama-gqa-biases", "qwen2-mixed", "gpt2", "opt", "bert", "roberta", "distilbert"]
)
def test_losses_are_those_of_models_put_together_by_hand(name):
    made = Made(name)
    candidates = made.candidates(5)
    found = made.losses(candidates)
    for candidate, loss in zip(candidates, found, strict=True):
        expected = made.expected(candidate)
        assert loss == pytest.approx(expected, rel=EXACT)
        assert expected > 1e-4, "a candidate that changes nothing tests nothing"


def test_what_is_padded_does_not_count():
    made = Made("llama-mha", padded=True)
    candidates = made.candidates(2)
    expected = [made.expected(candidate) for candidate in candidates]
    assert made.losses(candidates) == pytest.approx(expected, rel=EXACT)
    again = Made("llama-mha", padded=True)
    for batch in again.windows:
        batch.input_ids[~batch.attention_mask] = 11
    assert again.losses(candidates) == pytest.approx(expected, rel=EXACT)


def test_biases_that_a_level_adds_are_there():
    made = Made("llama-mha", biased=True)
    (candidate,) = made.candidates(1)
    assert made.losses([candidate])[0] == pytest.approx(made.expected(candidate), rel=EXACT)
    for site in made.adapter.sites_of(made.model, 0, ("ffn", "heads")):
        assert site.bias() is None, "the dense model stays as it is"


@pytest.mark.parametrize("name", ["llama-mha", "bert"])
def test_the_dense_model_is_no_distance_from_itself(name):
    made = Made(name)
    dense = tuple(units for _, units in made.sites)
    assert made.losses([dense]) == [0.0]


@pytest.mark.parametrize("shelf", ["device", "disk"])
def test_together_or_alone_the_bits_are_the_same(shelf, tmp_path):
    def one():
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return Made("llama-mha", shelf=DiskShelf(folder, CPU) if shelf == "disk" else None)

    together, alone = one(), one()
    candidates = together.candidates(2 * TOGETHER + 1)
    found = together.losses(candidates)
    assert found == [alone.losses([candidate])[0] for candidate in candidates]
    # the dense pass, then the layers once for each call of `TOGETHER`
    layers = len(together.adapter.layer_list(together.model)[1])
    assert len(together.opened) == layers * (1 + 3)
    together.oracle.free()
    if shelf == "disk":
        left = list((tmp_path / "0").iterdir())
        assert left == [], "nothing waits that nobody fetches"


def test_a_level_is_read_once_for_all_models_that_have_it():
    class Counting(HeldLevels):
        def __init__(self):
            super().__init__()
            self.loads = []

        def load(self, key, units, device):
            self.loads.append((key, units))
            return super().load(key, units, device)

    made = Made("llama-mha", levels=Counting())
    narrow = [min(made.made[key]) for key, _ in made.sites]
    # prefixes that differ in the first layer, and are the same in the last
    first = [index for index, (key, _) in enumerate(made.sites) if key[0] == 0]
    options = [sorted({*made.made[made.sites[i][0]], made.sites[i][1]}) for i in first]
    candidates = [
        tuple(dict(zip(first, chosen, strict=True)).get(i, units) for i, units in enumerate(narrow))
        for chosen in itertools.product(*options)
    ][:TOGETHER]
    assert len(candidates) == TOGETHER
    made.losses(candidates)
    last = [entry for entry in made.levels.loads if entry[0][0] > 0]
    assert len(last) == len(set(last)) > 0


def test_hidden_states_that_wait_are_as_many_as_the_plan_says():
    class Counted(DeviceShelf):
        def __init__(self):
            self.waiting = self.most = 0

        def put(self, tensor):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            item = super().put(tensor)
            free = item.free

            def freed():
                self.waiting -= 1
                free()

            item.free = freed
            return item

    made = Made("llama-mha", shelf=Counted())
    shelf, batches = made.oracle.runtime.shelf, len(made.windows)
    made.losses(made.candidates(4 * TOGETHER))
    # without shares of the windows
    assert (TOGETHER + 2) * batches < shelf.most <= (STATES - 2) * batches
    made.oracle.free()
    assert shelf.waiting == 0


def test_a_share_is_of_the_first_windows():
    made = Made("llama-mha")
    candidates = made.candidates(2)
    for share, windows in ((1 / 5, 1), (0.5, 3), (1e-9, 1), (1.0, 5)):
        found = made.losses(candidates, share)
        expected = [made.expected(candidate, windows) for candidate in candidates]
        assert found == pytest.approx(expected, rel=EXACT)


def test_what_was_asked_before_is_not_computed_again():
    made = Made("llama-mha")
    first, second = made.candidates(2)
    found = made.losses([first, second, first])
    made.opened.clear()
    assert made.losses([second, first, first]) == [found[1], found[0], found[0]]
    assert made.opened == []
    assert made.prepared == 1, "levels are made for what is not known"
    assert len(made.oracle.ledger) == 2


def test_only_some_layers_are_targeted():
    made = Made("llama-mha", targets=range(1, 2))
    candidates = made.candidates(3)
    expected = [made.expected(candidate) for candidate in candidates]
    assert made.losses(candidates) == pytest.approx(expected, rel=EXACT)
    # layers in front of the first targeted one are passed once, with the dense model
    assert made.opened == [0, 1, 1]


def test_levels_come_back_from_files_as_they_were(tmp_path):
    filed = FiledLevels(tmp_path / "levels")
    made = Made("opt", levels=filed)
    key, units = made.sites[0][0], 1
    level = filed.load(key, units, CPU)
    for name, tensor in made.made[key][units].tensors.items():
        assert torch.equal(level.tensors[name], tensor)
    (tmp_path / "levels" / f"{key[0]}.{key[1]}.1.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be read .*--overwrite"):
        filed.load(key, units, CPU)


def test_a_ledger_that_was_cut_off_goes_on(tmp_path):
    path = tmp_path / "search.jsonl"
    ledger = SearchLedger(path)
    ledger.add([(1, 2), (3, 4)], 5, [0.25, float("inf")])
    with open(path, "ab") as file:
        file.write(b'{"units": [7, ')
    again = SearchLedger(path)
    assert list(again.items()) == [((1, 2), 5, 0.25), ((3, 4), 5, float("inf"))]
    again.add([(5, 6)], 1, [0.5])
    assert len(SearchLedger(path)) == 3
    # any JSON reader reads it
    lines = path.read_text().splitlines()
    assert [json.loads(x, parse_constant=pytest.fail)["loss"] for x in lines] == [0.25, None, 0.5]
    assert (again.best(5), again.best(1), again.best(2)) == (0.25, 0.5, float("inf"))
    assert again.spent(5) == pytest.approx(2.2)
    path.write_text("no json\n")
    with pytest.raises(InputError, match="line 1 is damaged"):
        SearchLedger(path)
