"""What an artifact was made from.

walk.py      the artifacts, as data and as lines of text
drawing.py   where they stand on a sheet
page.py      the drawing and a table as one HTML page
"""

from heliostat.lineage.page import render_page
from heliostat.lineage.walk import Lineage, lineage, render_lineage, total_costs

__all__ = ["Lineage", "lineage", "render_lineage", "render_page", "total_costs"]
