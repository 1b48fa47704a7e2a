"""Cuts uint8 crops from an encoded image and decodes no more pixels than the crops need.

The size is read from the header, then the crops are drawn, then the image is decoded. A JPEG is
decoded at the smallest scale of its cosine transform at which no crop has to be enlarged, which
saves most of the work on large photographs. All other files, and damaged JPEGs, go through Pillow
with the same crops. A process that cuts crops in several threads should give OpenCV and torch one
thread each (`cv2.setNumThreads(1)`, `torch.set_num_threads(1)`); all heavy calls release the GIL.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch

from seer_scale.data.augment import Box, CropParameters, Pixels
from seer_scale.data.decode import MAX_PIXELS, BadImage, check_scans, decode

# Scales with a fast inverse transform: 3/8 takes as long as 4/8, and 5/8 to 7/8 longer than 8/8.
_EIGHTHS = (1, 2, 4, 8)
_RESIZE = torch.ops.aten._upsample_bilinear2d_aa.out
_PROGRESSIVE = 0xC2
_HUFFMAN_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_APP1, _START_OF_SCAN, _END = 0xE1, 0xDA, 0xD9
_ORIENTATION = 0x0112


class _Header(NamedTuple):
    """Facts of a JPEG's header; width and height in pixels, before EXIF's rotation."""

    width: int
    height: int
    orientation: int  # EXIF's, 1 to 8


def cut_crops(
    data: bytes,
    draw: Callable[[int, int], list[CropParameters]],
    *,
    max_pixels: int = MAX_PIXELS,
) -> tuple[list[Pixels], list[CropParameters]]:
    """Cuts crops out of an encoded image: crops and resizes, but neither flips nor distorts.

    Args:
        data: bytes of the file; they alone decide the format.
        draw: returns the parameters of the crops, given width and height in pixels after EXIF's
            rotation.
        max_pixels: largest width times height that is decoded.

    Returns:
        One RGB array uint8 [size, size, 3] per crop, and the parameters as drawn.

    Raises:
        BadImage: for the causes of `decode`.
    """
    header = _read_header(data) if data.startswith(b"\xff\xd8\xff") else None
    if header is None:
        pixels = np.array(decode(data, max_pixels=max_pixels))
        height, width = pixels.shape[:2]
        parameters = draw(width, height)
    else:
        if header.width * header.height > max_pixels:
            raise BadImage("too large")
        turned = header.orientation >= 5
        width, height = (header.height, header.width) if turned else (header.width, header.height)
        parameters = draw(width, height)
        pixels = _decode_jpeg(data, header, smallest_scale(parameters), max_pixels)
    # `pixels` is the whole image at a smaller scale, rounded up to whole pixels.
    scale_x, scale_y = pixels.shape[1] / width, pixels.shape[0] / height
    crops = [_resize(_view(pixels, crop.box, scale_x, scale_y), crop.size) for crop in parameters]
    return crops, parameters


def smallest_scale(parameters: list[CropParameters]) -> int:
    """Returns the smallest scale, in eighths, at which no box is smaller than its crop."""
    needed = 0.0
    for crop in parameters:
        left, top, right, bottom = crop.box
        needed = max(needed, crop.size / min(right - left, bottom - top))
    return next((eighths for eighths in _EIGHTHS if eighths >= 8 * needed), 8)


def _decode_jpeg(data: bytes, header: _Header, eighths: int, max_pixels: int) -> Pixels:
    """Decodes upright pixels [height, width, 3] at `eighths` of the size; Pillow: at full size."""
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            min_height=-(-header.height * eighths // 8),
            min_width=-(-header.width * eighths // 8),
        )
    except ValueError as error:
        # Truncated or corrupt data leave a gray or smeared image, which Pillow would accept. Stray
        # bytes between segments do no harm.
        message = str(error)
        if message.startswith("Corrupt JPEG data") and "extraneous bytes" not in message:
            raise BadImage("damaged") from error
        return np.array(decode(data, max_pixels=max_pixels))
    return _upright(pixels, header.orientation)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Returns a view of the pixels, rotated and mirrored by EXIF's orientation."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _view(pixels: Pixels, box: Box, scale_x: float, scale_y: float) -> Pixels:
    """Returns the part of the decoded image inside a box, which is given at full size."""
    left, top, right, bottom = box
    left, right = round(left * scale_x), round(right * scale_x)
    top, bottom = round(top * scale_y), round(bottom * scale_y)
    return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]


def _resize(view: Pixels, size: int) -> Pixels:
    """Resizes bilinearly with antialiasing: Pillow's filter, in torch's vectorised form."""
    image, crops = np.ascontiguousarray(view)[None], np.empty((1, size, size, 3), np.uint8)
    # With `out`, torch keeps the three colours of a pixel together; otherwise it separates them.
    out = torch.from_numpy(crops).permute(0, 3, 1, 2)
    _RESIZE(torch.from_numpy(image).permute(0, 3, 1, 2), (size, size), False, out=out)
    crop: Pixels = crops[0]
    return crop


def _read_header(data: bytes) -> _Header | None:
    """Reads the segments before the first scan; returns None if the fast decoder cannot do it."""
    width = height = components = 0
    orientation, progressive = 1, False
    position, end = 2, len(data)
    while position + 10 <= end and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill bytes may stand before a marker
            position += 1
            continue
        if marker in _HUFFMAN_FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            progressive = marker == _PROGRESSIVE
            if precision != 8 or components not in (1, 3):
                return None
        elif marker in _OTHER_FRAMES or marker == _END:
            return None
        elif marker == _START_OF_SCAN:
            if progressive or data[position + 4] < components:
                check_scans(data)
            return _Header(width, height, orientation) if width and height else None
        length = (data[position + 2] << 8) | data[position + 3]
        if marker == _APP1 and data.startswith(b"Exif\x00\x00", position + 4):
            orientation = _read_orientation(data[position + 10 : position + 2 + length])
        position += 2 + length
    return None


def _read_orientation(tiff: bytes) -> int:
    """Reads the orientation of an EXIF block; 1 (upright) if it is missing or broken."""
    order = {b"II*\x00": "<", b"MM\x00*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(directory + 2, directory + 2 + 12 * entries, 12):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == _ORIENTATION:
                return value if kind == 3 and count == 1 and 1 <= value <= 8 else 1
    except struct.error:  # offsets beyond the block
        pass
    return 1
