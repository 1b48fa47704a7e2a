"""A rendered COCO-format set: discs, boxes and triangles of random colours on a noisy ground."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CATEGORIES = ((3, "disc"), (7, "box"), (12, "triangle"))  # ids with gaps, as COCO's are
SIDE = 128


def write_objects(folder: Path, images: int = 10, *, same: bool = True) -> Path:
    """`train` and `val` (the same images, or others); masks as polygons and as run lengths."""
    for part, seed in (("train", 0), ("val", 0 if same else 1)):
        _write_part(folder, part, images, seed)
    return folder


def _write_part(folder: Path, part: str, images: int, seed: int) -> None:
    import numpy as np
    from PIL import Image, ImageDraw
    from pycocotools import mask as rle

    rng = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES],
    }
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number in range(images):
        ground = rng.integers(60, 196, 3) + rng.normal(0, 12, (SIDE, SIDE, 3))
        image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        draw, name = ImageDraw.Draw(image), f"{number:03d}.png"
        for corner in rng.permutation(4)[: rng.integers(1, 4)]:  # quarters: none overlap
            kind = int(rng.integers(0, 3))
            size = int(rng.integers(30, 54))
            x = int(64 * (corner % 2) + rng.integers(2, 62 - size))
            y = int(64 * (corner // 2) + rng.integers(2, 62 - size))
            mask = Image.new("1", (SIDE, SIDE))
            for canvas in (draw, ImageDraw.Draw(mask)):
                fill: Any = (
                    1 if canvas is not draw else tuple(rng.choice([10, 128, 245], 3).tolist())
                )
                if kind == 0:
                    canvas.ellipse((x, y, x + size, y + size), fill=fill)
                elif kind == 1:
                    canvas.rectangle((x, y, x + size, y + size), fill=fill)
                else:
                    canvas.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill)
            inside = np.array(mask, dtype=np.uint8)
            rows, columns = np.nonzero(inside)
            left, top = int(columns.min()), int(rows.min())
            width, height = int(columns.max()) + 1 - left, int(rows.max()) + 1 - top
            runs = rle.encode(np.asfortranarray(inside))
            segmentation: Any = {"size": runs["size"], "counts": runs["counts"].decode()}
            if kind == 1:
                right, bottom = left + width, top + height
                segmentation = [[left, top, right, top, right, bottom, left, bottom]]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 100 + number,
                    "category_id": CATEGORIES[kind][0],
                    "bbox": [left, top, width, height],
                    "area": int(inside.sum()),
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
        image.save(folder / part / name)
        content["images"].append(
            {"id": 100 + number, "file_name": name, "height": SIDE, "width": SIDE}
        )
    path = folder / "annotations" / f"instances_{part}.json"
    path.write_text(json.dumps(content))
