"""The report: one self-contained HTML file per evaluation and per sweep, which needs no network and no server.

    results, metrics.jsonl, trials ──charts──▶ pixel-ready figures ──templates──▶ one file

Left out: measuring anything (`pipeline.evaluation`, `tune`).
"""

from __future__ import annotations

from pipeline.report.content import Point, Trial
from pipeline.report.page import write_evaluation_report, write_sweep_report

__all__ = ["Point", "Trial", "write_evaluation_report", "write_sweep_report"]
