"""Pages: templates in which all text is escaped, the frame that they fill, and how they write numbers."""

import functools
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).parent


def page(template: str, /, folder: Path = HERE, **values: Any) -> str:
    """A template of `folder` filled; a value that it is not given raises."""
    return _environment(folder).get_template(template).render(**values)


@functools.cache
def _environment(folder: Path) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, HERE]), autoescape=True, undefined=jinja2.StrictUndefined
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
