"""How the weights of a layer and of those behind it become one layer's: LaCo's rules, and the mean.

`θ_0` is layer l, the base, whose place the merged layer takes; `θ_1 … θ_m` are the layers behind it
that go. A rule says what becomes of one tensor of theirs. `MergeRule.reference` is the definition,
as published and in float64; `MergeRule.coefficients` is the same sum with its terms collected, and
is what runs: where one layer is all that is left, its weights are copied and not computed.

The weights and biases of norms are a matter of their own: a rule has a default for them, and
`norms` overrides it. `base` leaves them as layer l has them, `rule` treats them as all else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor, nn

AUTO, BASE, RULE = "auto", "base", "rule"
NORMS = (AUTO, BASE, RULE)


@dataclass(frozen=True)
class MergeRule:
    """Attributes:

    reference: tensors of one shape, the base's first -> the merged one, float64; the definition.
    coefficients: m -> what `θ_0 … θ_m` are multiplied by; they add up to 1.
    norms: what becomes of norms unless asked otherwise, `base` or `rule`.
    """

    reference: Callable[[Sequence[Tensor]], Tensor]
    coefficients: Callable[[int], tuple[Fraction, ...]]
    norms: str


def rdsc_reference(thetas: Sequence[Tensor]) -> Tensor:
    """`θ_0 + Σ_k (θ_k − θ_0)` = `Σ_k θ_k − (m − 1) θ_0`: reserving differences, seeking common.

    Source: LaCo (arXiv 2402.11187), section 2. Of one layer it is that layer.
    """
    base, *others = (theta.double() for theta in thetas)
    merged = base.clone()
    for other in others:
        merged += other - base
    return merged


def telescope_reference(thetas: Sequence[Tensor]) -> Tensor:
    """What the code beside the paper computes: differences from what is merged already.

    `θ ← θ + (θ_k − θ)` for each k leaves `θ_m`, the weights of the last layer.
    Source: the notebooks of yangyifei729/LaCo, which leave norms as layer l has them.
    """
    merged, *others = (theta.double() for theta in thetas)
    for other in others:
        merged = merged + (other - merged)
    return merged


def mean_reference(thetas: Sequence[Tensor]) -> Tensor:
    """`Σ_k θ_k / (m + 1)`, k from 0: what else one would try first."""
    total = thetas[0].double().clone()
    for theta in thetas[1:]:
        total += theta.double()
    return total / len(thetas)


# the paper's θ is "the parameters of attention and FFN", and its code touches no norm
RULES = {
    "rdsc": MergeRule(rdsc_reference, lambda m: (Fraction(1 - m), *[Fraction(1)] * m), norms=BASE),
    "telescope": MergeRule(
        telescope_reference,
        lambda m: (*[Fraction(0)] * m, Fraction(1)),
        norms=BASE,
    ),
    "mean": MergeRule(mean_reference, lambda m: (Fraction(1, m + 1),) * (m + 1), norms=RULE),
}


def merge_reference(
    rule: str,
    layers: Sequence[Mapping[str, Tensor]],
    norms: Collection[str],
    norms_by: str = AUTO,
) -> dict[str, Tensor]:
    """The definition of a merge: tensors of one layer, float64, from those of several.

    Args:
        rule: of `RULES`; layers: tensors by name, the base's first, of equal names and shapes.
        norms: which of the names are those of norms; norms_by: `auto`, `base` or `rule`.
    """
    merge, by = RULES[rule].reference, norms_of(rule, norms_by)
    return {
        name: layers[0][name].double()
        if name in norms and by == BASE
        else merge([layer[name] for layer in layers])
        for name in layers[0]
    }


def norms_of(rule: str, norms_by: str) -> str:
    """What becomes of norms under a rule: `base` or `rule`."""
    return RULES[rule].norms if norms_by == AUTO else norms_by


def norm_names(layer: nn.Module) -> frozenset[str]:
    """The parameters of a layer that belong to norms, by the names of their modules' classes.

    Also those of queries and keys, as Qwen3 has them, and biases of a LayerNorm.
    """
    return frozenset(
        f"{path}.{name}".lstrip(".")
        for path, module in layer.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    )
