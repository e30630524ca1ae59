"""The policy gradient against an enumeration of all masks, and its projection against a solver."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from liar_ext.ops.policy import FLOOR, HORIZON, Policy, estimate, initial, project


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def every_mask(units: int) -> Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=units)), dtype=torch.float64)


def chance(mask: Tensor, keep: Tensor) -> float:
    return float(torch.where(mask > 0, keep, 1 - keep).prod())


def loss_table(units: int, seed: int) -> Tensor:
    """A loss for each mask, any function of it."""
    return drawn(2**units, seed=seed) * 3


def analytic(losses: Tensor, keep: Tensor) -> Tensor:
    """s(1 − s)/√((s + ε)(1 − s + ε)) · (E[L | m = 1] − E[L | m = 0])."""
    masks = every_mask(len(keep))
    weights = torch.tensor([chance(mask, keep) for mask in masks], dtype=torch.float64)
    found = []
    for unit, s in enumerate(keep.tolist()):
        means = []
        for value in (1.0, 0.0):
            own = masks[:, unit] == value
            means.append(float((weights * losses)[own].sum() / weights[own].sum()))
        scale = ((s + FLOOR) * (1 - s + FLOOR)) ** 0.5
        found.append(s * (1 - s) / scale * (means[0] - means[1]))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize(("units", "samples"), [(4, 2), (5, 2), (3, 3)])
def test_the_estimate_is_unbiased(units, samples, first):
    """Over all sets of masks that can be drawn, each with its probability; the baseline has seen
    the very losses that it is taken from."""
    keep, losses = 0.05 + 0.9 * drawn(units, seed=1), loss_table(units, 2)
    masks = every_mask(units)
    weight, before = (1.0, 0.0) if first else (1 / HORIZON, 0.7)
    expected = torch.zeros(units, dtype=torch.float64)
    for places in itertools.product(range(2**units), repeat=samples):
        own = torch.tensor(places)
        likely = 1.0
        for place in places:
            likely *= chance(masks[place], keep)
        baseline = (1 - weight) * before + weight * float(losses[own].mean())
        expected += likely * estimate(losses[own], masks[own], keep, baseline, weight)
    assert (expected - analytic(losses, keep)).abs().max() <= 1e-12 * losses.max()


def test_the_estimate_is_the_published_one_where_the_baseline_is_the_mean():
    keep, losses = drawn(6), drawn(3, seed=4)
    masks = (drawn(3, 6, seed=5) < keep).double()
    found = estimate(losses, masks, keep, float(losses.mean()), 1.0)
    for unit in range(6):
        s = float(keep[unit])
        expected = sum(
            (float(losses[k]) - float(losses.mean()))
            * (float(masks[k, unit]) - s)
            / ((s + 1e-7) * (1 - s + 1e-7)) ** 0.5
            for k in range(3)
        )
        assert float(found[unit]) == pytest.approx(expected / 2, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_projection_is_the_nearest_point_of_the_budget(seed):
    """Against scipy's solver for the quadratic programme."""
    optimize = pytest.importorskip("scipy.optimize")
    values = 3 * drawn(9, seed=seed) - 1
    most = float(drawn(1, seed=seed + 50)) * 6
    found = project(values, most)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(found.sum()) <= most + 1e-9
    solved = optimize.minimize(
        lambda x: float(((torch.from_numpy(x) - values) ** 2).sum()),
        x0=[most / 18] * 9,
        jac=lambda x: (2 * (torch.from_numpy(x) - values)).numpy(),
        bounds=[(0, 1)] * 9,
        constraints={
            "type": "ineq",
            "fun": lambda x: most - x.sum(),
            "jac": lambda x: -(x * 0 + 1),
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert solved.success
    assert (found - torch.from_numpy(solved.x)).abs().max() < 1e-5


def test_what_is_within_the_budget_is_only_clamped():
    values = torch.tensor([-0.3, 0.2, 1.4], dtype=torch.float64)
    assert project(values, 2.0).tolist() == [0.0, 0.2, 1.0]


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_first_probabilities_have_the_order_of_the_scores_and_the_share(share):
    scores = 4 * drawn(50, seed=3) - 2
    found = initial(scores, share)
    assert float(found.mean()) == pytest.approx(share, abs=1e-12)
    assert torch.equal(found.argsort(), scores.argsort())
    assert 0 < float(found.min()) < float(found.max()) < 1


def searched(losses_of, kinds: dict[str, int], share: float, steps: int, seed: int = 0) -> Policy:
    policy = Policy(
        {kind: torch.full((n,), share, dtype=torch.float64) for kind, n in kinds.items()},
        share,
        torch.Generator().manual_seed(seed),
    )
    for step in range(steps):
        masks = policy.draw(8)
        policy.step(losses_of(masks), masks, 0.03 * (1 - step / steps))
        for kind, keep in policy.keep.items():
            assert float(keep.sum()) <= share * kinds[kind] + 1e-9
    return policy


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_best_mask_of_a_small_problem_is_found(scale):
    """Units that are worth most can stand in for each other, so that ranking them one by one is
    wrong; the best mask by enumeration. The scale of losses does not matter."""
    units = 6
    worth = torch.tensor([1.0, 0.95, 0.9, 0.5, 0.45, 0.1], dtype=torch.float64)

    def loss(mask: Tensor) -> Tensor:
        twice = mask[..., 0] * mask[..., 1] + mask[..., 0] * mask[..., 2]
        return -scale * (mask @ worth - 0.8 * twice - 0.8 * mask[..., 1] * mask[..., 2])

    fitting = [mask for mask in every_mask(units) if float(mask.sum()) == 3]
    best = min(fitting, key=lambda mask: float(loss(mask)))
    assert best.tolist() == [1, 0, 0, 1, 1, 0]
    policy = searched(lambda masks: loss(masks["ffn"]), {"ffn": units}, 0.5, 600)
    kept = policy.keep["ffn"].argsort(descending=True)[:3]
    assert sorted(kept.tolist()) == best.nonzero().flatten().tolist()


def test_units_of_the_same_probability_have_the_order_of_the_start():
    start = {"ffn": torch.tensor([0.9, 0.6, 0.3, 0.7, 0.4], dtype=torch.float64)}
    policy = Policy(dict(start), 0.5, torch.Generator())
    assert torch.equal(policy.scores()["ffn"].argsort(), start["ffn"].argsort())
    policy.keep["ffn"] = torch.tensor([0.0, 0.0, 1.0, 0.2, 1.0], dtype=torch.float64)
    assert policy.scores()["ffn"].argsort(descending=True).tolist() == [4, 2, 3, 0, 1]
    # what is learned comes first, whatever it was
    policy.keep["ffn"] = torch.tensor([0.0, 0.00001, 1.0, 0.2, 0.99999], dtype=torch.float64)
    assert policy.scores()["ffn"].argsort(descending=True).tolist() == [2, 4, 3, 1, 0]


def test_each_kind_has_a_budget_of_its_own():
    def losses(masks: dict[str, Tensor]) -> Tensor:
        # heads matter a hundred times as much
        return -(100 * masks["heads"].sum(1) + masks["ffn"] @ torch.arange(8.0).double())

    policy = searched(losses, {"heads": 4, "ffn": 8}, 0.5, 200)
    assert float(policy.keep["heads"].sum()) <= 2 + 1e-9
    assert float(policy.keep["ffn"].sum()) <= 4 + 1e-9


def test_losses_that_are_not_finite_are_left_out_with_their_masks():
    def policy() -> Policy:
        keep = {"ffn": torch.full((5,), 0.5, dtype=torch.float64)}
        return Policy(keep, 0.5, torch.Generator().manual_seed(3))

    whole, part = policy(), policy()
    masks = whole.draw(4)
    losses = drawn(4)
    spoiled = torch.cat([losses[:2], torch.tensor([float("nan"), float("inf")]).double()])
    assert whole.step(losses[:2], {"ffn": masks["ffn"][:2]}, 0.1) == 2
    assert part.step(spoiled, masks, 0.1) == 2
    assert torch.equal(whole.keep["ffn"], part.keep["ffn"])
    before = part.keep["ffn"].clone()
    assert part.step(torch.full((4,), float("nan")).double(), masks, 0.1) == 0
    assert torch.equal(part.keep["ffn"], before)
