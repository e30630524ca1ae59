"""What the driver tells whoever watches it. The command line shows it with rich."""

from __future__ import annotations

from typing import Protocol

from liar_ext.report.schema import SiteReport


class Progress(Protocol):
    """Receives events in order; must not raise."""

    def begin(self, layers: int, label: str) -> None:
        """A pass over `layers` layers starts."""

    def site(self, report: SiteReport) -> None:
        """A Site was pruned."""

    def layer(self, index: int) -> None:
        """A layer is done."""

    def warn(self, message: str) -> None:
        """Something the user should know; it is in the report as well."""


class Silent:
    """Watches nothing."""

    def begin(self, layers: int, label: str) -> None: ...
    def site(self, report: SiteReport) -> None: ...
    def layer(self, index: int) -> None: ...
    def warn(self, message: str) -> None: ...
