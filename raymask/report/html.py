"""The report as one self-contained HTML page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment
from plotly.offline import get_plotlyjs

from raymask.report.sections import ReportSection, Table

REFRESH = 15  # seconds after which the browser reloads the page of a running search


def render_page(title: str, sections: Sequence[ReportSection], state: str, written: float) -> str:
    """Render a page with all scripts and styles inline.

    Args:
        title: The page's title.
        sections: What it shows, in this order.
        state: "running", "stopped", "failed" or "finished"; "compared" for a comparison of runs. A running page
            reloads itself.
        written: Unix time in seconds.

    Returns:
        The HTML text. It loads nothing from the network.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.tests["table"] = lambda value: isinstance(value, Table)
    template = environment.from_string((files("raymask.report") / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        sections=sections,
        plots=[plot for section in sections for _, plot in section.plots],
        state=state,
        when=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(written)),
        refresh=REFRESH if state == "running" else 0,
        plotly=get_plotlyjs(),
    )
