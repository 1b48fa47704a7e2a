"""Writes the table of folders in docs/design.md and the drawing of the layers, from the imports.

`python docs/generate_layers.py`; tests/test_layers.py fails where either is not what this makes.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from harness.layers import FACADE, FLOORS, LAYERS, find_modules, imports, room_of  # noqa: E402

PAGE = ROOT / "docs" / "design.md"
DRAWING = ROOT / "docs" / "images" / "layers.svg"
MARKS = ("<!-- layers: begin -->", "<!-- layers: end -->")
WIDTH, MARGIN, GAP, LINE = 1200, 16, 12, 15  # pixels
LETTER = 6.4  # pixels, of a letter of 11 pixels' height


@dataclass(frozen=True)
class Room:
    """A folder of the package, or a module that stands in the root.

    Attributes:
        name: without the package's name.
        floor: counted from the bottom, 0.
        sentence: what the folder is for: the first paragraph of its docstring.
        imports: names of the rooms that the folder imports from, sorted.
    """

    name: str
    floor: int
    sentence: str
    imports: list[str]


def rooms(root: Path = ROOT) -> list[Room]:
    """Every folder below `root`, from the top floor down, in alphabetical order on a floor."""
    modules = find_modules(root)
    used: dict[str, set[str]] = {}
    for module, path in modules.items():
        if module == FACADE:
            continue
        room = str(room_of(module))
        names = set(imports(ast.parse(path.read_text()), module, modules))
        reached = {room_of(name) for name in names if name in modules and name != FACADE}
        used.setdefault(room, set()).update(other for other in reached if other and other != room)
    ordered = sorted(used, key=lambda room: (-LAYERS[room], room))
    return [
        Room(
            short(room),
            LAYERS[room],
            sentence(modules.get(room)),
            sorted(short(other) for other in used[room]),
        )
        for room in ordered
    ]


def short(room: str) -> str:
    """The name of a room without the package's."""
    return room.removeprefix("seer_scale.")


def sentence(path: Path | None) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "") if path else ""
    return " ".join(text.partition("\n\n")[0].split()) or "Scripts that start the commands."


def table() -> str:
    """The rooms as a table in Markdown."""
    rows = ["| floor | folder | in one sentence | imports from |", "|---|---|---|---|"]
    for room in rooms():
        used = ", ".join(f"`{name}`" for name in room.imports) or "nothing"
        rows.append(f"| {room.floor} | `{room.name}` | {room.sentence} | {used} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """A page's text with the table of today between its marks."""
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{table()}\n{end}", text)


def drawing() -> str:
    """The house as an SVG: a row of boxes for each floor; a box says from where it imports."""
    parts: list[str] = []
    top = MARGIN
    found = rooms()
    for floor in range(len(FLOORS) - 1, -1, -1):
        row = [room for room in found if room.floor == floor]
        if not row:
            continue
        width = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / len(row)
        letters = int((width - 20) / LETTER)
        texts = [(wrap(r.sentence, letters), wrap(said(r), letters)) for r in row]
        height = 34 + LINE * max(len(what) + len(used) for what, used in texts) + 12
        for place, (room, (what, used)) in enumerate(zip(row, texts, strict=True)):
            left = MARGIN + place * (width + GAP)
            parts.append(box(room, what, used, left, top, width, height))
        top += height + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + MARGIN - GAP}" '
        'font-family="sans-serif" role="img" aria-label="The folders of seer_scale, floor by '
        'floor: a folder imports from lower floors only">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{"".join(parts)}</svg>\n'
    )


def said(room: Room) -> str:
    """What a box says of its imports."""
    return f"imports {', '.join(room.imports)}" if room.imports else "imports nothing of ours"


def box(
    room: Room, what: list[str], used: list[str], left: float, top: float, width: float, height: int
) -> str:
    """One room at (left, top), in pixels."""
    lines = [
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height}" rx="6" '
        'fill="#f3f6fb" stroke="#5b7aa8"/>',
        f'<text x="{left + 10:.0f}" y="{top + 22:.0f}" font-size="15" font-weight="bold" '
        f'fill="#16335b">{escape(room.name)}</text>',
    ]
    y = top + 40
    for colour, texts in (("#222222", what), ("#5a6472", used)):
        for text in texts:
            lines.append(
                f'<text x="{left + 10:.0f}" y="{y:.0f}" font-size="11" fill="{colour}">'
                f"{escape(text)}</text>"
            )
            y += LINE
    return "\n".join(lines) + "\n"


def wrap(text: str, letters: int) -> list[str]:
    """Lines of at most so many letters."""
    return textwrap.wrap(text, max(letters, 12))


def main() -> None:
    """Writes both."""
    PAGE.write_text(with_table(PAGE.read_text()))
    DRAWING.write_text(drawing())


if __name__ == "__main__":
    main()
