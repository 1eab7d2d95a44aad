"""What an artifact was made from.

walk.py   the tree, as data and as lines of text
page.py   the same as one HTML page with a drawing
"""

from heliostat.lineage.page import render_page
from heliostat.lineage.walk import LineageNode, distinct, lineage, render_lineage, total_costs

__all__ = ["LineageNode", "distinct", "lineage", "render_lineage", "render_page", "total_costs"]
