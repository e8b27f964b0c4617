"""`report.html`: what a run changed, its curves, its pictures and its settings, as one file that opens from disk."""

from __future__ import annotations

from cameo.report.charts import Series, line_chart
from cameo.report.write import Headline, Picture, ReportedRun, write_report

__all__ = ["Headline", "Picture", "ReportedRun", "Series", "line_chart", "write_report"]
