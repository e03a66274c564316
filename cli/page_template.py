"""The templates of the pages: every text is escaped, and what a template asks for must be there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2


def page_template(name: str, filters: Mapping[str, Callable[..., Any]]) -> jinja2.Template:
    """The template of a page.

    Args:
        filters: name in the template → how a value is written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(name)


def as_duration(seconds: float) -> str:
    """Seconds in the two largest units that count: `8 s`, `7 min 12 s`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
