"""Full fine-tuning: trunk and linear classifier trained together on labelled images.

Protocol and numbers of arXiv 2103.01988 (section 4) and VISSL's configurations; the defaults are
VISSL's. The global batches, their crops and the loss are the same at every number of processes.
"""

from __future__ import annotations

from typing import Any

from seer_scale.evaluation.datasets.labelled import LabelledData, open_labelled
from seer_scale.evaluation.datasets.train_list import read_names
from seer_scale.evaluation.task import Context, Result
from seer_scale.evaluation.tasks.finetune_loop import FineTuning
from seer_scale.evaluation.tasks.finetune_options import Options, check

__all__ = ["Options", "run"]


def run(context: Context, options: Options) -> Result:
    """Fine-tunes the context's trunk, which is moved to the host, and tests it.

    Every epoch is saved, and a run that was ended goes on from there in the same folder. The
    fine-tuned trunk is written to `context.folder/trunk`, which `seer_scale.load` takes, the
    classifier to `context.folder/classifier.safetensors`.

    Raises:
        UserError: if the batch cannot be split, or the folder holds another fine-tuning.
        DataError: if labels or images are not as they should be.
    """
    data = open_labelled(context.data, options.labels)
    if options.train_list:
        chosen = data.train.subset(read_names(options.train_list, data.train))
        data = LabelledData(chosen, data.val, data.classes)
    check(options, context.trunk_name, images=len(data.train))
    job = FineTuning(context, options, data)
    job.train()
    measured = job.test()
    job.export()
    return Result(_metrics(measured), _details(options, data, measured, job.losses))


def _metrics(measured: Any) -> dict[str, float]:
    counts, right, among_five = measured  # [classes] each
    total = int(counts.sum())
    return {"top1": int(right.sum()) / total, "top5": int(among_five.sum()) / total}


def _details(
    options: Options, data: LabelledData, measured: Any, losses: list[float]
) -> dict[str, Any]:
    counts, right, _ = measured
    per_class = {
        name: int(hits) / int(count)
        for name, hits, count in zip(data.classes, right, counts, strict=True)
        if count
    }
    return {
        "options": options.model_dump(mode="json"),
        "train_images": len(data.train),
        "test_images": int(counts.sum()),
        "classes": len(data.classes),
        "accuracy_per_class": per_class,
        "loss_per_epoch": losses,
    }
