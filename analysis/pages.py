"""What all pages share: one HTML file that explains itself and loads nothing.

A page is made from one result alone, so it can be written again from the result's JSON at any time, and equal results
give equal pages. Text from data files and models is escaped (jinja2 with autoescape), plotly.js is inside the file, and
a content security policy in the page forbids every request, so the file can be mailed, archived and opened without a
network.

A new kind of page needs a template that extends `templates/page.html.j2` (blocks `title` and `body`; pieces to build
from are in `templates/macros.html.j2`), a function in `analysis.figures` that gives its figures by name, and a module
like `analysis.localization_report` that puts the result into words and calls `render_page`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from analysis.figures import as_html, plotly_script
from analysis.words import number

_PAGES = Environment(
    loader=PackageLoader("analysis"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render_page(template: str, figures: Mapping[str, Any], recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The page as a string.

    Args:
        figures: plotly figures by name, in the order in which the page shows them; a name is also an id in the page.
        recipe: what determines the result's numbers, shown as JSON.
        facts: what else the template is given; everything is escaped except `Markup`.
    """
    return _PAGES.get_template(template).render(
        plotly=Markup(plotly_script()),
        figures=[
            {"name": name, "title": figure.layout["title"]["text"], "html": Markup(as_html(figure, name))}
            for name, figure in figures.items()
        ],
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False, default=str),
        **facts,
    )


def typeset(text: str) -> str:
    return text.replace(">=", "≥").replace("<=", "≤")


def as_sentence(text: str) -> str:
    """A result's sentence with its first letter large."""
    return typeset(text[:1].upper() + text[1:])


def setting(value: Any) -> str:
    """The value of a setting: a number, a list of them, or None for "auto"."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(setting, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "auto" if value is None else number(value) if isinstance(value, (int, float)) else str(value)


def settings(found: Mapping[str, Any], meanings: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Rows of the table of settings: name, value, what it is."""
    return [(key, setting(value), meanings.get(key, "")) for key, value in found.items()]
