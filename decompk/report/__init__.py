"""Tables of what decomposition costs, and of what the papers print beside what is counted here."""

from .decomposition import Report, report
from .paper import paper_cells, paper_report, paper_table, vgg_table
from .table import FORMATS, Column, Table

__all__ = [
    "FORMATS",
    "Column",
    "Report",
    "Table",
    "paper_cells",
    "paper_report",
    "paper_table",
    "report",
    "vgg_table",
]
