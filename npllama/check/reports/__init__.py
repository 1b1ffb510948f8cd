"""A report in the forms that people and machines read."""

from npllama.check.reports.html import html_report
from npllama.check.reports.junit import junit_report
from npllama.check.reports.text import headers, summary_lines, table_rows, text_report

__all__ = ["headers", "html_report", "junit_report", "summary_lines", "table_rows", "text_report"]
