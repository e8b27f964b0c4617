"""`report.html`: what a run changed, its curves, its pictures and its settings, as one file that opens from disk."""

from __future__ import annotations

from cameo.report.curves import ReportedRun
from cameo.report.write import Headline, Picture, write_report

__all__ = ["Headline", "Picture", "ReportedRun", "write_report"]
