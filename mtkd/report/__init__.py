"""A run directory told to people: one self-contained page, tables for the terminal, JSON."""

from mtkd.report.html import write_report
from mtkd.report.terminal import summary, terminal_tables

__all__ = ["summary", "terminal_tables", "write_report"]
