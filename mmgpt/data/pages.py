"""Pages about data: templates of this folder, in which all text is escaped, and how they write numbers."""

import functools
from pathlib import Path
from typing import Any

import jinja2


def page(template: str, **values: Any) -> str:
    """A template filled; a value that it is not given raises."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    made.filters |= {"percent": percent, "number": number}
    return made


def percent(share: float) -> str:
    """`12.3 %`, and `<0.1 %` for little that is not nothing."""
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{100 * share:.1f} %" if 0.995 <= share < 1 else f"{100 * share:.3g} %"


def number(value: float | str) -> str:
    """`12,345`, and of fractions three digits."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.3g}"
