"""A run directory for people to read: one self-contained page, tables for the terminal, JSON."""

from mtkd.evaluate.report.html import is_current, write_report
from mtkd.evaluate.report.read import check_whole
from mtkd.evaluate.report.terminal import summary, terminal_tables

__all__ = ["check_whole", "is_current", "summary", "terminal_tables", "write_report"]
