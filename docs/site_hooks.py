"""For `make docs`, what MkDocs calls with every page: outside links, tables of keys, search.

Links to files of the repository that are no pages become their paths, in code: MkDocs warns of
every link that leaves docs/, and the site may be read where no repository is.
"""

from __future__ import annotations

import json
import logging
import re
from html import unescape
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(\.\./([^)#\s]+)\)")
KEY = re.compile(r"\s*<td><code>([a-z]\w*\.[a-z]\w*)</code></td>")
TEST = re.compile(r"<code>((?:benchmarks/)?tests/[\w/.:]+)</code>")
STACKED = {
    "key",
    "choice",
    "feature",
    "fault",
    "input",
}  # first headings of tables that site.css stacks on a phone
KEYS_PAGE = "config.md"
LAST = "log.md"  # behind every other page in the results of a search
LOG = logging.getLogger("mkdocs.hooks.site_hooks")
KEYS: dict[str, dict[str, str]] = {}  # entries of the search by key


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls it with the text of every page; a file that is not there is a warning."""

    def path_of(link: re.Match[str]) -> str:
        text, path = link.groups()
        if not (ROOT / path).exists():
            LOG.warning(f"{page.file.src_uri} links to {path}, which does not exist")
        name = text.strip("`")
        if name.startswith("test_"):  # many in a cell: a pointer asks for the path
            return f'<code title="{path}">{_breaking(name)}</code>'
        return f"`{path}`" if name in path else f"{text} (`{path}`)"

    if page.file.src_uri == LAST:
        page.meta["search"] = {"boost": 1e-9}  # titles count a thousand times
    return LINK.sub(path_of, markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls it with the HTML of every page; site.css stacks the rows of some tables.

    Such a table gets the attribute `data-stacked` and every cell its heading. Every key of the
    configuration's page gets an anchor, to which a search for the key leads.
    """

    anchors: set[str] = set()
    html = TEST.sub(lambda test: f"<code>{_breaking(test[1])}</code>", html)

    def labelled(table: re.Match[str]) -> str:
        headings = re.findall(r"<th\b[^>]*>(.*?)</th>", table[0], re.DOTALL)
        if headings[0] not in STACKED:
            return table[0]
        first, *rows = table[0].replace("<table>", "<table data-stacked>").split("<tr>")
        return first + "".join(row_of(row, iter(headings)) for row in rows)

    def row_of(row: str, label: Any) -> str:
        anchor, found = "", KEY.match(row) if page.file.src_uri == KEYS_PAGE else None
        if found and (key := found[1]) not in anchors:
            anchors.add(key)
            anchor = f' id="{key}"'
            _, *cells = re.findall("<td>(.*?)</td>", row)
            text = unescape(re.sub("<.*?>", "", ", ".join(cells)))
            KEYS[key] = {"location": f"{page.url}#{key}", "title": key, "text": text}
        row = re.sub("<td>", lambda _: f'<td data-label="{next(label)}">', row)
        return f"<tr{anchor}>{row}"

    return re.sub("<table>.*?</table>", labelled, html, flags=re.DOTALL)


@event_priority(-100)  # after the plugin that writes the index
def on_post_build(*, config: Any, **_: Any) -> None:
    """MkDocs calls it at the end; every key becomes an entry of the search with its own title."""
    path = Path(config.site_dir) / "search" / "search_index.json"
    index = json.loads(path.read_text())
    index["docs"] += KEYS.values()
    path.write_text(json.dumps(index, separators=(",", ":")))


def _breaking(name: str) -> str:
    """Lets a browser break a long name behind every _ and /."""
    return re.sub("([_/]|::)", r"\1<wbr>", name)
