"""VISSL's files in each of its layouts: read exactly, heads recognised, and written again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import seer_scale
from seer_scale.convert import convert, open_trunk
from seer_scale.convert.names import to_grouped
from seer_scale.errors import CheckpointError
from seer_scale.models import TRUNKS
from seer_scale.models.heads import ProjectionHead, Prototypes
from tests.convert.vissl_layouts import (
    local_state,
    write_consolidated,
    write_sharded,
    write_sliced,
)
from tests.convert.vissl_model import VisslRegNet
from tests.convert.weights import assert_same_bits, difference, images, randomised

TRUNK = "regnety_debug"
WIDTH = TRUNKS[TRUNK].stages[-1].width
# As RG-10B's: a stage in two groups.
GROUPS = [[1], [1, TRUNKS[TRUNK].stages[1].depth], []]


def vissl_trunk(grouped: bool = False) -> VisslRegNet:
    return randomised(VisslRegNet(TRUNKS[TRUNK], GROUPS if grouped else None)).eval()


def swav_head(batch_norm: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """VISSL's names and ours; the modules are ours, the indices those of VISSL's Sequential."""
    mlp = randomised(ProjectionHead(WIDTH, (32, 32, 8), batch_norm=batch_norm), 5)
    prototypes = randomised(Prototypes(8, 20), 6)
    ours = {f"head.{name}": tensor for name, tensor in mlp.state_dict().items()}
    ours["prototypes.weight"] = prototypes.state_dict()["weight"]
    theirs = {
        name.replace("head.layers", "projection_head").replace("prototypes.", "prototypes0."): t
        for name, t in ours.items()
    }
    return theirs, ours


def dictionary(*heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{i}.{name}": tensor for i, head in enumerate(heads) for name, tensor in head.items()}


def sharded(flatten: bool, world: int, absolute: bool = False) -> Callable[..., None]:
    def write(path: Path, trunk: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> None:
        write_sharded(path, trunk, [head], world, flatten, absolute)

    return write


LAYOUTS: dict[str, Callable[[Path, Mapping[str, Tensor], Mapping[str, Tensor]], None]] = {
    "consolidated": lambda path, trunk, head: write_consolidated(path, trunk, dictionary(head)),
    "heads in a list": lambda path, trunk, head: write_consolidated(path, trunk, [head]),
    "sharded": sharded(False, 3),
    "sharded, flat": sharded(True, 4),
    "sharded, more ranks than elements": sharded(False, 70),
    "sharded, listed by absolute paths": sharded(False, 2, absolute=True),
    "sliced": lambda path, trunk, head: write_sliced(path, trunk, dictionary(head)),
}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grouped", [False, True])
def test_each_layout_is_read(layout: str, grouped: bool, tmp_path: Path) -> None:
    model, (head, ours) = vissl_trunk(grouped), swav_head(batch_norm=False)
    LAYOUTS[layout](tmp_path / "model.torch", model.state_dict(), head)
    # Checkpoints are moved about: the list names files that are no longer where they were.
    moved = Path(shutil.move(tmp_path, tmp_path.with_name(f"{tmp_path.name}_moved")))
    trunk = seer_scale.load(moved / "model.torch")
    batch = images()
    with torch.inference_mode():
        assert difference(trunk(batch), model(batch)) < 1e-5
    found = open_trunk(moved / "model.torch")
    assert found.trunk == TRUNK
    assert len(found.kinds) == len(model.state_dict())
    assert_same_bits({name: found.head.read(name) for name in found.head.kinds}, ours)
    assert found.notes == ()


@pytest.mark.parametrize("layout", ["sharded, listed by absolute paths", "sliced"])
def test_a_list_that_is_moved_alone_finds_its_files_where_they_were(
    layout: str, tmp_path: Path
) -> None:
    state = vissl_trunk().state_dict()
    LAYOUTS[layout](tmp_path / "model.torch", state, {})
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(tmp_path / "model.torch", tmp_path / "elsewhere" / "other.torch")
    expected = open_and_read(tmp_path / "plain.torch", state)
    assert_same_bits(dict(seer_scale.load(moved).state_dict()), expected)


PREFIXES = ["module.", "trunk.", "trunk.base_model.", "module.trunk._fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_and_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    model = vissl_trunk()
    plain = open_and_read(tmp_path / "plain.torch", model.state_dict())
    renamed = {
        prefix + name.replace(".f.a.", ".f._fsdp_wrapped_module._fpw_module.a."): tensor
        for name, tensor in model.state_dict().items()
    }
    assert_same_bits(open_and_read(tmp_path / "wrapped.torch", renamed), plain)
    torch.save({"state_dict": renamed}, tmp_path / "flat.pth")
    assert_same_bits(dict(seer_scale.load(tmp_path / "flat.pth").state_dict()), plain)


def open_and_read(path: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    write_consolidated(path, state, {})
    return dict(seer_scale.load(path).state_dict())


def test_files_of_the_old_format_are_read_and_said_to_be(tmp_path: Path) -> None:
    state = vissl_trunk().state_dict()
    path = tmp_path / "old.torch"
    torch.save(
        {"classy_state_dict": {"base_model": {"model": {"trunk": state, "heads": {}}}}},
        path,
        _use_new_zipfile_serialization=False,
    )
    found = open_trunk(path)
    assert "before 1.6" in found.notes[0]
    expected = open_and_read(tmp_path / "new.torch", state)
    assert_same_bits({name: found.read(name) for name in found.kinds}, expected)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_swav_head_there_and_back(batch_norm: bool, tmp_path: Path) -> None:
    model, (head, ours) = vissl_trunk(), swav_head(batch_norm)
    write_consolidated(tmp_path / "in.torch", model.state_dict(), dictionary(head))
    convert(tmp_path / "in.torch", "safetensors", tmp_path / "own")
    convert(tmp_path / "own", "vissl", tmp_path / "out.torch")
    written = torch.load(tmp_path / "out.torch", weights_only=True)
    parts = written["classy_state_dict"]["base_model"]["model"]
    assert_same_bits(parts["trunk"], model.state_dict())
    assert_same_bits(parts["heads"], dictionary(head))
    convert(tmp_path / "own", "safetensors", tmp_path / "one.safetensors")
    found = open_trunk(tmp_path / "one.safetensors")
    assert_same_bits({name: found.head.read(name) for name in found.head.kinds}, ours)
    found = convert(tmp_path / "own", "huggingface", tmp_path / "hf")
    assert f"dropped the SwAV head ({len(ours)} tensors)" in found.notes[0]


def test_an_export_over_another_has_nothing_of_its_head(tmp_path: Path) -> None:
    model, (head, ours) = vissl_trunk(), swav_head(batch_norm=False)
    write_consolidated(tmp_path / "with.torch", model.state_dict(), dictionary(head))
    write_consolidated(tmp_path / "without.torch", model.state_dict(), {})
    convert(tmp_path / "with.torch", "safetensors", tmp_path / "own")
    assert open_trunk(tmp_path / "own").head.kinds.keys() == ours.keys()
    convert(tmp_path / "without.torch", "safetensors", tmp_path / "own")
    assert open_trunk(tmp_path / "own").head.kinds == {}


@pytest.mark.parametrize("kind", ["linear", "eval_mlp", "eval_mlp without affine"])
def test_a_classifier_keeps_its_scores(kind: str, tmp_path: Path) -> None:
    model = vissl_trunk()
    linear = randomised(nn.Linear(WIDTH, 11), 7)
    norm = randomised(nn.BatchNorm2d(WIDTH, affine="without" not in kind), 8).eval()
    assert norm.running_var is not None
    norm.running_var[::2] = 1e-5  # of channels that hardly vary: as much as BatchNorm's eps
    head = {f"clf.0.{name}": tensor for name, tensor in linear.state_dict().items()}
    if kind != "linear":
        head = {f"clf.{name}": tensor for name, tensor in head.items()}
        head |= {f"channel_bn.{name}": tensor for name, tensor in norm.state_dict().items()}
    other = {"channel_bn.running_mean": torch.zeros(3), "clf.clf.0.weight": torch.zeros(11, 12)}
    write_consolidated(tmp_path / "ft.torch", model.state_dict(), dictionary(other, head))
    batch = images()
    with torch.inference_mode():
        pooled = model(batch)
        if kind != "linear":
            pooled = norm(pooled[..., None, None]).flatten(1)
        expected = linear(pooled)

    found = convert(tmp_path / "ft.torch", "huggingface", tmp_path / "hf")
    assert found.head.classes == 11
    assert len(found.notes) == 1
    assert "dropped heads.0" in found.notes[0]
    from transformers import AutoModel, RegNetForImageClassification

    with torch.inference_mode():
        theirs = RegNetForImageClassification.from_pretrained(tmp_path / "hf").eval()
        assert difference(theirs(batch).logits, expected) < 1e-4
        bare = AutoModel.from_pretrained(tmp_path / "hf").eval()
        assert difference(bare(batch).pooler_output.flatten(1), model(batch)) < 1e-4
    convert(tmp_path / "hf", "torchvision", tmp_path / "tv.pth")
    convert(tmp_path / "tv.pth", "vissl", tmp_path / "back.torch")
    back = open_trunk(tmp_path / "back.torch")
    for leaf in ("weight", "bias"):
        name = f"classifier.{leaf}"
        assert torch.equal(back.head.read(name), found.head.read(name))


def test_a_classifier_in_timm(tmp_path: Path) -> None:
    import timm

    trunk = "regnety_200mf"
    model = randomised(VisslRegNet(TRUNKS[trunk])).eval()
    linear = randomised(nn.Linear(TRUNKS[trunk].stages[-1].width, 5), 7)
    head = {f"0.clf.0.{name}": tensor for name, tensor in linear.state_dict().items()}
    write_consolidated(tmp_path / "ft.torch", model.state_dict(), head)
    convert(tmp_path / "ft.torch", "timm", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.inference_mode():
        assert difference(theirs(images()), linear(model(images()))) < 1e-4


def test_a_classifier_in_transformers(tmp_path: Path) -> None:
    from transformers import RegNetForImageClassification

    model, linear = vissl_trunk(), randomised(nn.Linear(WIDTH, 5), 7)
    head = {f"0.clf.0.{name}": tensor for name, tensor in linear.state_dict().items()}
    write_consolidated(tmp_path / "ft.torch", model.state_dict(), head)
    convert(tmp_path / "ft.torch", "huggingface", tmp_path / "out")
    theirs = RegNetForImageClassification.from_pretrained(tmp_path / "out").eval()
    # It would also take names without the prefix of its trunk, but others read the file too.
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == theirs.state_dict().keys()
    with torch.inference_mode():
        assert difference(theirs(images()).logits, linear(model(images()))) < 1e-4


def test_rg10b_s_third_stage_is_in_the_two_groups_that_it_recomputes() -> None:
    """The published groups of the third stage end before blocks 9 and 17."""
    for index, group in ((0, 0), (8, 0), (9, 1), (16, 1)):
        name = f"trunk_output.block3.block3-{index}.f.a.0.weight"
        assert to_grouped(name, "rg_10b") == (
            f"_feature_blocks.res4.block3-part{group}.block3-{index}.f.a.0.weight"
        )
    assert to_grouped("trunk_output.block2.block2-6.f.c.1.bias", "rg_10b") == (
        "_feature_blocks.res3.block2-part0.block2-6.f.final_bn.bias"
    )


def test_joining_shards_is_fairscales(tmp_path: Path) -> None:
    pytest.importorskip("fairscale")
    from fairscale.nn import FullyShardedDataParallel

    state = vissl_trunk().state_dict()
    for flatten in (False, True):
        pairs = [local_state(state, rank, 3, flatten) for rank in range(3)]
        joined = FullyShardedDataParallel.consolidate_shard_weights(
            [local for local, _ in pairs], [meta for _, meta in pairs]
        )
        write_sharded(tmp_path / f"{flatten}.torch", state, [], 3, flatten)
        convert(tmp_path / f"{flatten}.torch", "vissl", tmp_path / f"{flatten}_out.torch")
        written = torch.load(tmp_path / f"{flatten}_out.torch", weights_only=True)
        assert_same_bits(written["classy_state_dict"]["base_model"]["model"]["trunk"], joined)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    state = vissl_trunk().state_dict()
    path = tmp_path / "model.torch"
    write_sharded(path, state, [], 3)
    with pytest.raises(CheckpointError, match="is one shard of a checkpoint"):
        open_trunk(tmp_path / "model_shard1.torch")
    (tmp_path / "model_shard2.torch").unlink()
    with pytest.raises(CheckpointError, match=r"model_shard2\.torch, which the checkpoint"):
        open_trunk(path)
    write_sliced(tmp_path / "sliced.torch", state, {})
    next((tmp_path / "sliced_layers").iterdir()).unlink()
    with pytest.raises(CheckpointError, match="which the checkpoint lists, is not there"):
        open_trunk(tmp_path / "sliced.torch")
