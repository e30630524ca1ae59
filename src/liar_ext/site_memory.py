"""Bytes that one Site holds: on the way to it, in its statistics, and in its repair.

Methods take the Site, for a model has few kinds of them and one set of sizes.
"""

from __future__ import annotations

from collections.abc import Callable

from liar_ext.costs import SitePlan
from liar_ext.engine.ranks import BUFFER_BYTES
from liar_ext.engine.ridge import choice_bytes
from liar_ext.engine.statistics import CHUNK_TOKENS
from liar_ext.memory_parts import Sizes
from liar_ext.ops.gram import TOKENS
from liar_ext.ops.interpolate import products_bytes, repair_bytes
from liar_ext.ops.moments import column_bytes
from liar_ext.ops.residual import residual_bytes
from liar_ext.reconstruction import Reconstruction

# what `csrc/cpu/gram.cpp` packs at a time: fp32 bytes, or that many tokens if they are more
_PACKED_BYTES, _PACKED_TOKENS = 16 << 20, 2048
# columns of G that `ops.gram` multiplies at a time on a GPU
_PANEL = 2048


class SiteBytes:
    """What Sites hold at each step of their pruning.

    Args:
        reconstruction: what repairs; chooses: tokens are held out to choose its ridge.
        paired: the dense path goes beside, for `--target-signal dense` or `stream`.
        judging: most bytes that the criterion holds beside the statistics of a Site.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        reconstruction: Reconstruction,
        chooses: bool,
        paired: bool,
        judging: Callable[[SitePlan], int],
    ) -> None:
        self._sizes, self._paired = sizes, paired
        self._reconstruction, self._chooses, self._judging = reconstruction, chooses, judging

    def two_paths(self, site: SitePlan) -> bool:
        """Whether the dense path and the pruned one meet at a Site."""
        return self._paired or bool(site.across)

    def widths(self, site: SitePlan) -> list[int]:
        """Columns of what a paused forward holds beside the layer's input.

        The Site's input, what the module was given, and q, k and v or what is added to the output.
        """
        beside = site.producer_rows if site.kind == "heads" else self._sizes.hidden
        return [site.columns_before, self._sizes.hidden, beside + site.beside]

    def frame(self, site: SitePlan, positions: int) -> int:
        """What forwards of so many positions hold that are paused there."""
        return positions * sum(self.widths(site)) * self._sizes.item

    def passing(self, site: SitePlan) -> int:
        """What a batch makes on its way to a Site, beside what it holds there.

        Three more copies of the queries while positions are turned into them; gate and product of
        an FFN with its input; the float32 copies of a norm.
        """
        s = self._sizes
        copies = 3 if site.kind == "heads" else 2
        return s.batch * max(copies * site.columns_before * s.item, 8 * s.hidden)

    def beside(self, site: SitePlan) -> int:
        """Rows of the products with the drift of a Site's output."""
        return site.outputs if self.two_paths(site) else 0

    def sums(self, site: SitePlan) -> dict[str, int]:
        """Sums of a segment, of all segments, and rows that wait until they are a chunk."""
        s = self._sizes
        columns = site.columns_before
        together = columns + self.beside(site)
        return {
            "moments": 4 * columns * together,
            "float64_sums": 0 if s.alone else 8 * columns * together,
            "held_out_sums": 8 * columns * together if self._chooses else 0,
            "waiting_rows": self._rows() * together * s.item,
        }

    def moments(self, site: SitePlan) -> dict[str, int]:
        """Of all tokens, with the drift if there is one, and of those that are held out."""
        own = 4 * site.columns_before * (site.columns_before + self.beside(site))
        return {"moments": own, "held_out_moments": own if self._chooses else 0}

    def exchanged(self, columns: int) -> dict[str, int]:
        """A buffer of the triangle, whose own rows do not wait any more."""
        item = 4 if self._sizes.alone else 8
        return {"exchange": min(BUFFER_BYTES, item * columns**2), "waiting_rows": 0}

    def _rows(self) -> int:
        s = self._sizes
        if s.batch >= CHUNK_TOKENS:
            return 0
        return min(s.positions, -(-CHUNK_TOKENS // s.batch) * s.batch)

    def gram(self, site: SitePlan) -> dict[str, int]:
        """One copy of the rows of a chunk, and what the kernel makes of them.

        Of a pair also a batch of the output on both paths, their difference, and column statistics.
        """
        s = self._sizes
        rows, columns = self._rows(), site.columns_before
        tokens = rows or s.batch
        if not s.cuda:
            fit = max(_PACKED_TOKENS, _PACKED_BYTES // (4 * columns))
            packed = 4 * min(tokens, fit) * columns
        elif s.item == 2:
            packed = 4 * columns * min(columns, _PANEL)
        else:
            # three bfloat16 planes
            packed = 6 * min(tokens, TOKENS["cuda"]) * columns
        beside = self.beside(site)
        joined = rows * (columns + beside) * s.item if rows > s.batch else 0
        found = {"joined_rows": joined, "packed_rows": packed}
        if beside:
            found["drift_rows"] = 3 * s.batch * beside * s.item + column_bytes(s.batch, beside)
        return found

    def repair(self, site: SitePlan) -> int:
        """Selection, solve, or the residual beside its result, whichever is most."""
        n, kept, outputs = site.columns_before, site.columns_after, site.outputs
        rows = -(-outputs // self._sizes.ranks)
        # the repaired rows, and all of them once those of other ranks are here
        repaired = 8 * kept * (rows if self._sizes.ranks == 1 else rows + outputs)
        residual = repaired + residual_bytes(n, rows, kept)
        solve = 0
        if self.two_paths(site):
            solve = repair_bytes(kept, n - kept, outputs, rows, route="fold first")
            if self._chooses:
                solve = choice_bytes(kept, n - kept, rows, own=solve, drift=True)
        elif kept < n:
            given = outputs if self._reconstruction.whole else rows
            solve = self._reconstruction.holds(kept, n - kept, outputs, given)
            if self._chooses:
                solve = choice_bytes(kept, n - kept, given, own=solve)
        if solve and self._sizes.cuda:
            solve += products_bytes(kept, max(outputs, n - kept))
        return max(self._judging(site), solve, residual)
