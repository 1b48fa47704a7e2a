"""For `make docs`, what MkDocs calls with every page: outside links, tables, code, search.

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
CODE = re.compile(r"(<pre>(?:<span></span>)?)?(<code[^>]*>)(.*?)(</code>)", re.DOTALL)
HEADING = re.compile(r"(?<=<th><code>)\w{18,}(?=</code>)")  # of a column of short values
# Lines of columns or with arrows: they are read as a picture, and lose their sense when wrapped.
DRAWING = re.compile(r"\S {3,}[^#\s\\]|--&gt;|^ +\|", re.MULTILINE)
# What a browser would break behind a -: options and names in code, numbers and arrows in cells.
NAME = re.compile(r"\S*-\S*")
NUMBER = re.compile(r"[\d.]+e-\d+|-&gt;")
LONGEST = 24  # characters of what is kept whole; a phone's line of code has 44
STACKED = {
    "FORMAT",
    "choice",
    "command",
    "fault",
    "feature",
    "figure",
    "floor",
    "input",
    "key",
    "preset",
    "sharding.strategy",
    "your images",
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
        if re.sub("<.*?>", "", headings[0]) not in STACKED:
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

    html = HEADING.sub(lambda heading: _breaking(heading[0]), html)
    html = re.sub("<table>.*?</table>", labelled, html, flags=re.DOTALL)
    html = re.sub("<td[^>]*>.*?</td>", lambda cell: _whole(NUMBER, cell[0]), html, flags=re.DOTALL)
    return CODE.sub(_code, html)


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


def _code(code: re.Match[str]) -> str:
    """Keeps names in a piece of code whole, and marks a block that is a drawing."""
    block, start, text, end = code.groups()
    if block and DRAWING.search(re.sub("<.*?>", "", text)):
        return block.replace("<pre", "<pre data-drawing") + start + text + end
    return (block or "") + start + _whole(NAME, text) + end


def _whole(what: re.Pattern[str], html: str) -> str:
    """Lets no browser break what a pattern finds in text, if that is short."""

    def kept(found: re.Match[str]) -> str:
        short = len(unescape(found[0])) <= LONGEST
        return f'<span class="whole">{found[0]}</span>' if short else found[0]

    pieces = re.split("(<.*?>)", html)  # text at even places, tags at odd ones
    return "".join(
        piece if place % 2 else what.sub(kept, piece) for place, piece in enumerate(pieces)
    )
