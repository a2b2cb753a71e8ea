"""Results in words, tables and plots: `report.html`, the terminal table, Markdown, CSV and the model card."""

from guidetune.report.card import model_card
from guidetune.report.html import write, write_comparison
from guidetune.report.tables import arms_table, csv_text, markdown

__all__ = ["arms_table", "csv_text", "markdown", "model_card", "write", "write_comparison"]
