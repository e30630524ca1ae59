"""Bytes that one compression holds at once: its phases, each a sum of named parts.

Nothing here depends on the number of layers; only gradients of units do (`needs`). A part is in the
memory of the device or in that of the host; on a CPU these are one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from liar_ext.checkpoint.reader import PIECE_BYTES
from liar_ext.costs import SitePlan
from liar_ext.engine.moments_file import BLOCK_BYTES
from liar_ext.memory_parts import Phase, Sizes, next_layer, phase, power_of_two
from liar_ext.ops.cosine import cosine_bytes
from liar_ext.ops.moments import column_bytes
from liar_ext.reconstruction import Reconstruction
from liar_ext.site_memory import SiteBytes
from liar_ext.survey import Reads


class Phases:
    """The phases of a compression.

    Args:
        sites: of the layer that needs most, in the order in which they are pruned.
        sequential: forwards stand at one Site; else the Moments of a layer are made in one pass.
        survey: what a survey before anything is pruned reads, None for no survey;
            survey_bytes: what it makes of that, at most.
        learning: numbers that autograd keeps for a token where a survey learns, in the compute
            dtype and in float32; zeros where it only measures, None where it does not learn.
        library: Moments are kept on disk.
        reconstruction: what repairs.
        chooses: tokens are held out to choose its ridge.
        paired: the dense path goes beside, for `--target-signal dense` or `stream`.
        judging: most bytes that the criterion holds beside the statistics of a Site.
    """

    def __init__(
        self,
        sizes: Sizes,
        sites: Sequence[SitePlan],
        *,
        sequential: bool,
        survey: Reads | None,
        survey_bytes: int,
        learning: tuple[int, int] | None,
        library: bool,
        reconstruction: Reconstruction,
        chooses: bool,
        paired: bool,
        judging: Callable[[SitePlan], int],
    ) -> None:
        self._sizes, self._sites = sizes, sites
        self._of = SiteBytes(
            sizes, reconstruction=reconstruction, chooses=chooses, paired=paired, judging=judging
        )
        self._paired = any(map(self._of.two_paths, sites))
        self._sequential, self._library = sequential, library
        self._survey, self._survey_bytes, self._learning = survey, survey_bytes, learning

    def all(self) -> list[Phase]:
        """In the order in which they come first."""
        found = self._surveying()
        if self._paired:
            found.append(self._ahead())
        if any(site.across for site in self._sites):
            found.append(self._across())
        if self._sequential:
            for first, site in enumerate(self._sites):
                found += self._stopping(site, written=not first)
        else:
            found += self._through()
        return [*found, self._opening(), self._copying()]

    def _surveying(self) -> list[Phase]:
        """Up to the end of the survey."""
        if not self._sizes.positions:
            return []
        if self._survey == "weights":
            return [self._reading(), self._embedding()]
        found = [self._embedding()]
        if self._survey == "columns" and not self._library:
            found += [self._scoring(site) for site in self._sites]
        elif self._survey == "moments":
            found += self._forwards(written=False, when=" in the survey") + self._made(
                "survey", self._survey_bytes
            )
        elif self._survey == "states":
            found.append(self._comparing())
        if self._learning is not None:
            found.append(self._adjusting(*self._learning))
        return found

    def making_levels(self, levels: Sequence[SitePlan]) -> list[Phase]:
        """A search's repairs of dense Sites, one after the other.

        Args:
            levels: of the layer that needs most, Sites in the order of its forward.
        """
        most = [
            # a single unit has no levels
            max((self._of.repair(own) for own in levels if own.kind == site.kind), default=0)
            for site in self._sites
        ]
        return self._forwards(written=False, when=" for levels") + self._made("level", *most)

    def _phase(self, name: str, device: dict[str, int], host: dict[str, int]) -> Phase:
        return phase(self._sizes, name, device, host)

    def _embedding(self) -> Phase:
        s = self._sizes
        device, host = self._waiting()
        device |= {"embeddings": s.outside, "passing_batch": s.batch * s.hidden * s.item}
        (host if s.cuda else device)["next_layer"] = s.outside_read
        return self._phase("embedding", device, host)

    def _opening(self) -> Phase:
        device, host = self._standing(written=True)
        host["opened_tensor"] = 0 if self._sizes.cuda else self._sizes.largest
        return self._phase("opening a layer", device, host)

    def _copying(self) -> Phase:
        return self._phase("copying what is beside the layers", {}, {"pieces": 2 * PIECE_BYTES})

    def _reading(self) -> Phase:
        """A survey of weights alone: nothing waits, no token is there."""
        s = self._sizes
        device = {"layer": s.layer, "survey": self._survey_bytes}
        following = 2 * s.pinned if s.cuda else s.read
        return self._phase("reading the weights", device, {"next_layer": following})

    def _comparing(self) -> Phase:
        """Hidden states on both sides of a layer, and what their cosines take."""
        s = self._sizes
        device, host = self._standing(written=False, leaving=True)
        widest = max(self._of.frame(site, s.batch) + self._of.passing(site) for site in self._sites)
        cosines = cosine_bytes(s.batch, s.hidden, s.item, "cuda" if s.cuda else "cpu")
        device["passing_batch"] = max(widest, cosines)
        return self._phase("comparing hidden states", device, host)

    def _adjusting(self, numbers: int, wide: int) -> Phase:
        """A layer with gates between what enters it and what leaves it; with autograd, if numbers
        are kept for it."""
        s = self._sizes
        device, host = self._standing(written=False, leaving=True)
        # the output, its change and its square
        passing = 12 * s.batch * s.hidden
        if numbers:
            device["graph"] = s.batch * (numbers * s.item + wide * 4)
            # gradients on their way
            widest = max(site.columns_before for site in self._sites)
            device["backward"] = passing + 2 * s.batch * widest * s.item
        else:
            frames = [
                self._of.frame(site, s.batch) + self._of.passing(site) for site in self._sites
            ]
            device["passing_batch"] = max(passing, *frames)
        return self._phase("learning rates of a layer", device, host)

    def _scoring(self, site: SitePlan) -> Phase:
        """Column statistics: the valid rows of a batch, and what is made of a block of them."""
        s = self._sizes
        device, host = self._standing(written=False, leaving=True)
        rows = s.batch * site.columns_before * s.item if s.masks else 0
        made = rows + column_bytes(s.batch, site.columns_before)
        device["passing_batch"] = self._of.frame(site, s.batch) + max(self._of.passing(site), made)
        return self._phase(f"scoring {site.kind}", device, host)

    def _ahead(self) -> Phase:
        """The dense path through a layer: its frames one batch at a time, and what is kept."""
        s = self._sizes
        device, host = self._standing(written=True)
        self._outputs(self._sites, device, host)
        device["passing_batch"] = max(
            self._of.frame(site, s.batch) + self._of.passing(site) for site in self._sites
        )
        return self._phase("dense forward", device, host)

    def _across(self) -> Phase:
        """The dense path through a layer that is left out, while the one in front of it is open;
        first of all through the embeddings of the whole model.

        States of both paths, those that entered the gap, and those that leave the layer.
        """
        s = self._sizes
        device, host = self._standing(written=True)
        more, waiting = self._waiting(leaving=True)
        device["hidden_states"] += more["hidden_states"]
        for name, size in waiting.items():
            host[name] = host.get(name, 0) + size
        self._outputs(self._sites, device, host)
        device["layer_left_out"] = max(s.layer, s.outside)
        device["passing_batch"] = max(
            self._of.frame(site, s.batch) + self._of.passing(site) for site in self._sites
        )
        return self._phase("across left-out layers", device, host)

    def _outputs(
        self, sites: Sequence[SitePlan], device: dict[str, int], host: dict[str, int]
    ) -> None:
        """Outputs of the dense path that wait for these Sites."""
        s = self._sizes
        widths = [site.outputs for site in sites if self._of.two_paths(site)]
        positions = s.positions if s.place == "device" else s.batch
        device["dense_outputs"] = positions * sum(widths) * s.item
        if s.place == "host":
            host["dense_outputs"] = self._pinned(widths)

    def _stopping(self, site: SitePlan, *, written: bool) -> list[Phase]:
        """Forwards to a Site, the Gram of the last of them, and the repair, nothing freed."""
        s = self._sizes
        n = site.columns_before
        device, host = self._standing(written=written)
        self._outputs(self._sites[self._sites.index(site) :], device, host)
        held = self._of.frame(site, s.batch if s.place != "device" else s.positions)
        if s.place == "host":
            host["paused_forwards"] = self._pinned(self._of.widths(site))
        sums = self._of.sums(site)
        forward = device | {
            "paused_forwards": held,
            **sums,
            "passing_batch": self._of.passing(site),
        }
        gram = device | {"paused_forwards": held, **sums, **self._of.gram(site)}
        moved = 0 if s.place != "device" else held
        repair = self._of.repair(site)
        solve = device | {"paused_forwards": moved, **self._of.moments(site), "repair": repair}
        found = [
            self._phase(f"forward to {site.kind}", forward, host),
            self._phase(f"statistics of {site.kind}", gram, host),
        ]
        if s.ranks > 1:
            total = device | {"paused_forwards": moved} | sums | self._of.exchanged(n)
            found.append(self._phase(f"sum over ranks of {site.kind}", total, host))
        return [*found, self._phase(f"repair of {site.kind}", solve, host)]

    def _through(self) -> list[Phase]:
        """One pass for all Sites of a layer, whose Moments are then there together."""
        repairs = [self._of.repair(site) for site in self._sites]
        if self._library:
            repairs = [max(own, 2 * BLOCK_BYTES) for own in repairs]
        return self._forwards(written=True) + self._made("repair", *repairs)

    def _forwards(self, *, written: bool, when: str = "") -> list[Phase]:
        s = self._sizes
        device, host = self._standing(written=written, leaving=True)
        parts: list[dict[str, int]] = [self._of.sums(site) for site in self._sites]
        sums = {name: sum(part[name] for part in parts) for name in parts[0]}
        found = []
        for site in self._sites:
            frame = self._of.frame(site, s.batch)
            passing = {"passing_batch": frame + self._of.passing(site)}
            found.append(
                self._phase(f"forward to {site.kind}{when}", device | sums | passing, host)
            )
            gram = {"passing_batch": frame, **self._of.gram(site)}
            found.append(
                self._phase(f"statistics of {site.kind}{when}", device | sums | gram, host)
            )
        if s.ranks > 1:
            exchanged = self._of.exchanged(max(site.columns_before for site in self._sites))
            found.append(self._phase(f"sum over ranks{when}", device | sums | exchanged, host))
        return found

    def _made(self, what: str, *most: int) -> list[Phase]:
        """What is made of Moments that are there together; bytes of each Site, or of all."""
        device, host = self._standing(written=False)
        squares = [sum(self._of.moments(site).values()) for site in self._sites]
        found = []
        for number, site in enumerate(self._sites):
            own = {
                **self._of.moments(site),
                "statistics_of_other_sites": sum(squares[number + 1 :]),
                what: most[min(number, len(most) - 1)],
            }
            found.append(self._phase(f"{what} of {site.kind}", device | own, host))
        return found

    def _standing(
        self, *, written: bool, leaving: bool = False
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Weights and hidden states, on the device and on the host."""
        s = self._sizes
        device, host = self._waiting(leaving)
        device["layer"] = s.layer
        several = s.layers > 1
        host["next_layer"] = next_layer(s)
        # from a GPU the writing thread fetches it by pieces, while the next one is computed
        (device if s.cuda else host)["written_layer"] = s.written if written and several else 0
        return device, host

    def _waiting(self, leaving: bool = False) -> tuple[dict[str, int], dict[str, int]]:
        """Hidden states that enter a layer, with `leaving` those that leave it, too.

        With two paths those of both; they are one where `leaving` is asked.
        """
        s = self._sizes
        row = s.hidden * s.item
        times = 2 if leaving or self._paired else 1
        device = {"attention_masks": s.masks}
        if s.place == "device":
            return device | {"hidden_states": times * s.positions * row}, {}
        device["hidden_states"] = times * s.batch * row
        host = times * self._pinned([s.hidden]) if s.place == "host" else 0
        return device, {"hidden_states": host} if host else {}

    def _pinned(self, widths: Sequence[int]) -> int:
        """Bytes of page-locked copies, one of each width for each batch."""
        s = self._sizes
        batches = -(-s.positions // s.batch)
        return batches * sum(power_of_two(s.batch * width * s.item) for width in widths)
