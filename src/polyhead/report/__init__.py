"""The report of `polyhead report MODEL`: as data (`data`), as a page (`page`), as files (`write`)."""

from polyhead.report.data import ReportData
from polyhead.report.page import build_page
from polyhead.report.write import write_report

__all__ = ["ReportData", "build_page", "write_report"]
