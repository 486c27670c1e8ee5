"""The report of a run: one self-contained HTML page, built from a run folder and nothing else."""

from antibackdoor.report.page import build_report

__all__ = ["build_report"]
