from liar_ext.report.schema import Report, SiteReport

__all__ = ["Report", "SiteReport"]
