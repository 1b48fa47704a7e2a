"""Contact sheets: rows of images, each image with lines of text below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

INK, FAINT = (20, 20, 20), (110, 110, 110)
MARGIN = 8  # pixels between two cells, and around the sheet

_PAPER = (255, 255, 255)
_LINE, _FONT_SIZE = 13, 11  # pixels

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


def draw_cell(
    image: Image.Image | None, lines: Iterable[tuple[str, Colour]], width: int
) -> Image.Image:
    """Draws one cell of a sheet.

    Args:
        image: the picture, at most `width` wide; None for a cell of text only.
        lines: text and its colour; what is wider than the cell is cut off.
        width: width of the cell in pixels.
    """
    lines = list(lines)
    top = image.height + MARGIN // 2 if image else 0
    cell = Image.new("RGB", (width, top + _LINE * len(lines)), _PAPER)
    if image:
        cell.paste(image)
    draw = ImageDraw.Draw(cell)
    for number, (text, colour) in enumerate(lines):
        draw.text((0, top + _LINE * number), text, colour, _font(text.isascii()))
    return cell


@cache
def _font(plain: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that a package brings along. Pillow's own, for plain ASCII, has hardly any accent."""
    if plain:
        return ImageFont.load_default(size=_FONT_SIZE)
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", _FONT_SIZE - 1)


def draw_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Puts cells into rows; each row is as high as its highest cell."""
    width = max((sum(cell.width + MARGIN for cell in row) for row in rows), default=0)
    height = sum(max(cell.height for cell in row) + MARGIN for row in rows)
    sheet = Image.new("RGB", (width + MARGIN, height + MARGIN), _PAPER)
    top = MARGIN
    for row in rows:
        left = MARGIN
        for cell in row:
            sheet.paste(cell, (left, top))
            left += cell.width + MARGIN
        top += max(cell.height for cell in row) + MARGIN
    return sheet
