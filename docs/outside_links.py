"""For `make docs`: links to files of the repository that are no pages become their paths, in code.

MkDocs warns of every link that leaves docs/, and the site may be read where no repository is.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)\)")
LOG = logging.getLogger("mkdocs.hooks.outside_links")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls it with the text of every page; a file that is not there is a warning."""

    def path_of(link: re.Match[str]) -> str:
        text, path = link.groups()
        if not (ROOT / path).exists():
            LOG.warning(f"{page.file.src_uri} links to {path}, which does not exist")
        return f"`{path}`" if text.strip("`") in path else f"{text} (`{path}`)"

    return LINK.sub(path_of, markdown)
