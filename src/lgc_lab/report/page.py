"""Pages that hold everything they show, and open without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from lgc_lab.folder import write_whole


def write_page(page: Path, template: str, **content: Any) -> None:
    """Write an HTML page, whole or not at all.

    Args:
        page: the file.
        template: its path in this package.
        content: what the template is filled with.
    """
    loader = jinja2.PackageLoader("lgc_lab", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_whole(page, environment.get_template(template).render(content))
