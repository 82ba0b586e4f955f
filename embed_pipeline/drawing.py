"""Figures as SVG text, drawn without matplotlib's global state."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


def svg_of(figure: Figure, name: str) -> str:
    """The figure as one <svg> element: text stays text, the same bytes for the same figure.

    `name` keeps the ids of several figures on one page apart. The XML header and the document type, which names a
    remote DTD, are left out.
    """
    FigureCanvasSVG(figure)
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'id="(figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend)_?[\d.]*"', "", svg)
