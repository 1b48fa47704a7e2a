"""Detection: reading COCO's format, AP against known answers, one number anywhere, overfitting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from harness.pool import Distributed
from seer_scale.errors import DataError, UserError
from seer_scale.evaluation.datasets.coco import CocoPart, Picture, corners, open_coco
from seer_scale.evaluation.detect_batches import training_batches
from seer_scale.evaluation.detect_score import average_precision
from seer_scale.evaluation.detect_score import detect as find_objects
from seer_scale.evaluation.detector import build_detector, train_mode
from seer_scale.evaluation.task import Result
from seer_scale.evaluation.tasks import detect
from seer_scale.models import build_trunk
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm
from tests.evaluation.objects import SIDE, write_objects
from tests.evaluation.patterns import context

TINY: dict[str, Any] = {
    "iterations": 3,
    "batch": 2,
    "lr": 0.005,
    "lr_steps": [2],
    "warmup": 2,
    "min_sizes": [96, 128],
    "channels": 16,
    "anchors": [16, 32, 64, 128],
    "rois": 8,
    "workers": 1,
}
OVERFIT: dict[str, Any] = {
    "iterations": 450,
    "batch": 5,
    "lr": 0.08,
    "lr_steps": [380],
    "warmup": 20,
    "weight_decay": 0.0,
    "min_sizes": [128],
    "channels": 64,
    "rois": 32,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("objects"), images=5)


def job(folder: str, data: str, options: dict[str, Any]) -> Result:
    """On every rank of the pool."""
    return detect.run(context(Path(folder), data), detect.Options(**options))


def test_what_is_read_is_what_was_drawn(data: Path) -> None:
    train, _ = open_coco(str(data), masks=True)
    assert train.names == ["disc", "box", "triangle"]
    for picture in train.pictures:
        masks = train.masks(picture, picture.singles)
        assert masks.shape == (len(picture.singles), SIDE, SIDE)
        for single, mask in zip(picture.singles, masks, strict=True):
            rows, columns = np.nonzero(mask.numpy())
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert corners(single) == box
            assert single["area"] == mask.sum()


def flipped_back(image: torch.Tensor, target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    left, top, right, bottom = target["boxes"].unbind(1)
    boxes = torch.stack([SIDE - right, top, SIDE - left, bottom], 1)
    return {"image": image.flip(-1), "boxes": boxes, "masks": target["masks"].flip(-1)}


def test_batches_follow_from_the_seed_and_flips_move_everything(data: Path) -> None:
    train, _ = open_coco(str(data), masks=True)
    by_pixels = {}
    for picture in train.pictures:
        image = torch.from_numpy(np.array(picture.read())).permute(2, 0, 1) / 255
        by_pixels[image.sum().item()] = picture

    def first(start: int) -> list[Any]:
        stream = training_batches(train, batch=5, first=start, seed=3, masks=True, workers=2)
        return [next(stream), next(stream)]

    epochs = first(0)
    again = first(1)
    flips = 0
    for (image, target), (same, _) in zip(epochs[1], again[0], strict=True):
        assert torch.equal(image, same)
        nearest = min(by_pixels, key=lambda total: abs(total - image.sum().item()))
        picture = by_pixels[nearest]
        straight = torch.from_numpy(np.array(picture.read())).permute(2, 0, 1) / 255
        seen = {"image": image, **target}
        if not torch.equal(image, straight):
            seen = flipped_back(image, target)
            flips += 1
        assert torch.equal(seen["image"], straight)
        assert seen["boxes"].tolist() == [list(corners(single)) for single in picture.singles]
        assert torch.equal(seen["masks"], train.masks(picture, picture.singles))
    assert 0 < flips < 5


def perfect(part: CocoPart) -> list[dict[str, Any]]:
    """Detections that are what was annotated, crowds left out."""
    from pycocotools import mask as rle

    found = []
    for picture in part.pictures:
        masks = part.masks(picture, picture.singles).numpy()
        for single, mask in zip(picture.singles, masks, strict=True):
            left, top, right, bottom = corners(single)
            found.append(
                {
                    "image_id": picture.id,
                    "category_id": single["category_id"],
                    "bbox": [left, top, right - left, bottom - top],
                    "score": 0.9,
                    "segmentation": rle.encode(np.asfortranarray(mask)),
                }
            )
    return found


def test_average_precision_of_known_answers(data: Path) -> None:
    _, val = open_coco(str(data), masks=True)
    found = perfect(val)
    for kind in ("bbox", "segm"):
        numbers, by_category = average_precision(val, found, kind)
        assert set(numbers.values()) == {1.0}
        assert set(by_category.values()) == {1.0}
    none, _ = average_precision(val, [], "bbox")
    assert none == {"box_ap": 0.0, "box_ap50": 0.0, "box_ap75": 0.0}
    # A box that overlaps by 0.7 counts up to that threshold: 0.50, 0.55, ..., 0.70 of ten.
    for each in found:
        each["bbox"][2] *= 0.7
    numbers, _ = average_precision(val, found, "bbox")
    assert numbers["box_ap50"] == 1.0
    assert numbers["box_ap75"] == 0.0
    assert numbers["box_ap"] == pytest.approx(0.5, abs=0.11)


def edited(data: Path, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the set whose training annotations are changed."""
    for part in ("train", "val"):
        (folder / part).symlink_to(data / part)
    (folder / "annotations").mkdir()
    for path in (data / "annotations").iterdir():
        content = json.loads(path.read_text())
        if "train" in path.name:
            edit(content)
        (folder / "annotations" / path.name).write_text(json.dumps(content))
    return folder


def test_crowds_are_neither_trained_on_nor_counted_against(data: Path, tmp_path: Path) -> None:
    def make_crowd(content: dict[str, Any]) -> None:
        content["annotations"][0].update(
            iscrowd=1,
            segmentation={"size": [SIDE, SIDE], "counts": [0, SIDE * SIDE]},
            bbox=[0, 0, SIDE, SIDE],
            area=SIDE * SIDE,
        )

    train, _ = open_coco(str(edited(data, tmp_path, make_crowd)), masks=True)
    objects = sum(len(picture.annotations) for picture in train.pictures)
    assert sum(len(picture.singles) for picture in train.pictures) == objects - 1
    found = perfect(train)
    crowd = train.pictures[0].annotations[0]
    found.append({**found[0], "category_id": crowd["category_id"], "score": 0.99})
    found[-1] = {**found[-1], "image_id": train.pictures[0].id, "bbox": [4, 4, 30, 30]}
    numbers, _ = average_precision(train, found, "bbox")
    assert numbers["box_ap"] == 1.0  # what lies in a crowd is no mistake


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda c: c["annotations"][0].update(category_id=5), r"category 5.*3 \(disc\), 7 \(box\)"),
        (lambda c: c["annotations"][0].update(image_id=1), "is of image 1, which the file does"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 1 has no bbox of four numbers"),
        (lambda c: c["annotations"][0].pop("segmentation"), "no segmentation.*masks=false"),
        (lambda c: c["images"][0].update(file_name="gone.png"), r"gone\.png is missing"),
        (lambda c: c["images"].clear(), "lists no images"),
        (lambda c: c["annotations"].clear(), "has no objects"),
        (lambda c: c["categories"].append({"id": 20, "name": "ring"}), "different categories"),
        (lambda c: c.pop("categories"), "not a COCO annotation file: 'categories' is missing"),
    ],
)
def test_wrong_annotations_are_one_sentence(
    data: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        open_coco(str(edited(data, tmp_path, edit)), masks=True)


def test_missing_files_are_one_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder with `train`"):
        open_coco(str(tmp_path / "nowhere"), masks=True)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no annotations of `train`"):
        open_coco(str(tmp_path), masks=True)
    (tmp_path / "train" / "annotations.json").write_text("{")
    with pytest.raises(DataError, match="no folder `val`"):
        open_coco(str(tmp_path), masks=True)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "annotations.json").write_text("{}")
    with pytest.raises(DataError, match=r"annotations\.json cannot be read"):
        open_coco(str(tmp_path), masks=True)


def test_an_image_of_another_size_is_named(data: Path) -> None:
    picture = open_coco(str(data), masks=True)[0].pictures[0]
    other = Picture(picture.id, picture.path, SIDE + 1, SIDE, picture.annotations)
    with pytest.raises(DataError, match=r"000\.png has 128 x 128 pixels.* say 128 x 129"):
        other.read()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"anchors": [8, 16]}, r"anchors=\[8, 16\], but regnety_debug needs 4"),
    ],
)
def test_options_that_do_not_fit(
    data: Path, tmp_path: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        job(str(tmp_path), str(data), {**TINY, **options})


@pytest.mark.parametrize("trunk", ["regnety_debug", "regnety_200mf"])
@pytest.mark.parametrize("sync", [True, False])
def test_every_stage_feeds_the_pyramid(trunk: str, sync: bool) -> None:
    backbone = build_trunk(trunk)
    detector: Any = build_detector(
        backbone,
        classes=3,
        masks=True,
        sync=sync,
        channels=8,
        anchors=(8, 16, 32, 64, 128),
        rois=8,
        min_sizes=(64,),
        max_size=128,
    )
    stages = len(backbone.stages())
    with torch.no_grad():
        maps = detector.backbone(torch.zeros(1, 3, 64, 64))
    sides = [x.shape[-1] for x in maps.values()]
    assert sides == [16 // 2**level for level in range(stages + 1)]
    train_mode(detector)
    norms = [m for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(norm, GroupedSyncBatchNorm) for norm in norms) == sync
    assert {norm.training for norm in norms} == {sync}
    assert {norm.weight.requires_grad for norm in norms} == {sync}


def scores(folder: str, data: str) -> tuple[dict[str, float], int]:
    """What a detector that is the same everywhere finds."""
    torch.manual_seed(0)
    detector: Any = build_detector(
        build_trunk("regnety_debug"),
        classes=3,
        masks=True,
        sync=False,
        channels=8,
        anchors=(16, 32, 64, 128),
        rois=8,
        min_sizes=(96,),
        max_size=128,
    )
    detector.roi_heads.score_thresh = 0.0
    detector.roi_heads.detections_per_img = 6
    _, val = open_coco(data, masks=True)
    found = find_objects(detector, val, torch.device("cpu"))
    assert {each["image_id"] for each in found} == {picture.id for picture in val.pictures}
    numbers = average_precision(val, found, "bbox")[0] | average_precision(val, found, "segm")[0]
    # AP of an untrained one may be 0: boxes and scores have to agree too.
    total = sum(round(1e6 * each["score"]) + round(sum(each["bbox"]) * 100) for each in found)
    return numbers, total


def test_a_box_is_written_by_its_corner_and_its_sides(data: Path) -> None:
    """As COCO has it; a detector of torchvision gives two corners, and labels from 1 on."""

    class Finds(nn.Module):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            assert len(images) == 1
            boxes, scores = torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([0.5])
            return [{"boxes": boxes, "labels": torch.tensor([2]), "scores": scores}]

    _, val = open_coco(str(data), masks=False)
    found = find_objects(Finds(), val, torch.device("cpu"))
    assert [each["image_id"] for each in found] == [picture.id for picture in val.pictures]
    for each in found:
        assert each["bbox"] == [10.0, 20.0, 20.0, 40.0]
        assert (each["category_id"], each["score"]) == (val.categories[1][0], 0.5)


@pytest.mark.parametrize("world", [2, 4])
def test_every_world_size_judges_each_image_once(
    distributed: Distributed, data: Path, tmp_path: Path, world: int
) -> None:
    expected = scores(str(tmp_path), str(data))
    assert distributed(scores, world, str(tmp_path), str(data)) == [expected] * world


@pytest.mark.parametrize("more", [{}, {"masks": False, "batch_norm": "frozen"}])
def test_a_killed_one_goes_on_bit_for_bit(
    data: Path, tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**TINY, **more, "save_every": 2}
    expected = job(str(tmp_path / "whole"), str(data), options)
    assert ("mask_ap" in expected.metrics) == options.get("masks", True)
    step = detect._Training._step

    def die(self: Any, module: Any, samples: Any, iteration: int) -> float:
        if iteration == 2:
            raise KeyboardInterrupt
        return step(self, module, samples, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(detect._Training, "_step", die)
        with pytest.raises(KeyboardInterrupt):
            job(str(tmp_path / "cut"), str(data), options)
    assert job(str(tmp_path / "cut"), str(data), options) == expected
    files = [(tmp_path / n / "detector.safetensors").read_bytes() for n in ("whole", "cut")]
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    assert torch.equal(*tensors)
    with pytest.raises(UserError, match="other options"):
        job(str(tmp_path / "cut"), str(data), {**options, "lr": 0.1})


def test_two_processes_train(distributed: Distributed, data: Path, tmp_path: Path) -> None:
    first, second = distributed(job, 2, str(tmp_path), str(data), {**TINY, "precision": "bf16"})
    assert first == second
    assert 0 <= first.metrics["box_ap"] <= 1


def test_the_published_schedule() -> None:
    options = detect.Options()
    rates = [detect.learning_rate(options, i) for i in (0, 50, 100, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 2e-3, 2e-4])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_images_are_overfitted(tmp_path: Path) -> None:
    write_objects(tmp_path / "data", images=10)
    options = {**TINY, **OVERFIT}
    result = job(str(tmp_path / "out"), str(tmp_path / "data"), options)
    assert result.metrics["box_ap"] > 0.9
    assert result.metrics["mask_ap"] > 0.8


def test_the_picture_reader_takes_what_exif_turned(tmp_path: Path) -> None:
    """COCO annotates rows as they are stored."""
    image = Image.new("RGB", (40, 20), (200, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert Picture(1, tmp_path / "a.jpg", 20, 40, ()).read().size == (40, 20)
