"""Full fine-tuning: trunk and linear classifier are trained together on labelled images.

Protocol and numbers are those of SEER (arXiv 2103.01988, section 4) and of VISSL's configurations;
the defaults are VISSL's. The global batches, their crops and the loss are the same under any number
of processes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from seer_scale.evaluation.datasets.labelled import LabelledData, open_labelled
from seer_scale.evaluation.datasets.train_list import read_names
from seer_scale.evaluation.options import FinetuneOptions
from seer_scale.evaluation.task import Context, Result
from seer_scale.evaluation.tasks.finetune_loop import FineTuning
from seer_scale.evaluation.tasks.finetune_schedule import check

Options = FinetuneOptions


def run(context: Context, options: Options) -> Result:
    """Fine-tunes the context's trunk, which is moved to the host, and tests it.

    Every epoch is saved; a killed fine-tuning resumes in the same folder. The fine-tuned trunk is
    written to `context.folder/trunk`, which `seer_scale.load` takes, and the classifier to
    `context.folder/classifier.safetensors`.

    Raises:
        UserError: the batch cannot be split, or the folder holds another fine-tuning.
        DataError: labels or images cannot be used.
    """
    context = replace(context, labels=options.labels or context.labels)
    data = open_labelled(context.data, context.labels, context.say)
    if options.train_list:
        chosen = data.train.subset(read_names(options.train_list, data.train))
        data = LabelledData(chosen, data.val, data.classes)
    check(options, context.trunk_name, images=len(data.train))
    job = FineTuning(context, options, data)
    job.train()
    measured = job.test()
    job.export()
    return Result(_metrics(measured), _details(context, options, data, measured, job.losses))


def _metrics(measured: Any) -> dict[str, float]:
    counts, right, among_five = measured  # [classes] each
    total = int(counts.sum())
    return {"top1": int(right.sum()) / total, "top5": int(among_five.sum()) / total}


def _details(
    context: Context, options: Options, data: LabelledData, measured: Any, losses: list[float]
) -> dict[str, Any]:
    counts, right, _ = measured
    per_class = {
        name: int(hits) / int(count)
        for name, hits, count in zip(data.classes, right, counts, strict=True)
        if count
    }
    return {
        "options": {**options.model_dump(mode="json"), "labels": context.labels},
        "train_images": len(data.train),
        "test_images": int(counts.sum()),
        "classes": len(data.classes),
        "accuracy_per_class": per_class,
        "loss_per_epoch": losses,
    }
