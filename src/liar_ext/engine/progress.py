"""What the driver tells whoever watches it. The command line shows it with rich."""

from __future__ import annotations

from typing import Protocol, Self

from liar_ext.report.schema import SiteReport


class Progress(Protocol):
    """Receives events in order; must not raise."""

    def begin(self, layers: int, label: str, done: int = 0) -> None:
        """A pass over `layers` layers, or so many steps, starts, of which `done` are done."""

    def site(self, report: SiteReport) -> None:
        """A Site was pruned."""

    def layer(self, index: int) -> None:
        """A layer, or a step, is done."""

    def tell(self, message: str) -> None:
        """Something that the user may want to know while it runs."""

    def warn(self, message: str) -> None:
        """Something the user should know; it is in the report as well."""


class Silent:
    """Watches nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...
    def begin(self, layers: int, label: str, done: int = 0) -> None: ...
    def site(self, report: SiteReport) -> None: ...
    def layer(self, index: int) -> None: ...
    def tell(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...
