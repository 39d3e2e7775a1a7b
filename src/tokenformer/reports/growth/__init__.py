"""The report of a plan: perplexity or error over the cost of its stages, against every baseline."""

from tokenformer.reports.growth.page import markdown_table, write_growth_report

__all__ = ["markdown_table", "write_growth_report"]
