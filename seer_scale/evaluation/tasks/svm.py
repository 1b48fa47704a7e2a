"""Linear SVMs on features, one class against the rest: the VOC 2007 protocol of VISSL's benchmark.

The features have unit length, the squared hinge loss is solved in the dual, positives count twice,
and the cost of each class is chosen by cross-validation on the training part (Goyal et al., arXiv
1905.01235). scikit-learn solves; each rank takes its share of the classes.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from seer_scale import distributed
from seer_scale.errors import DataError, UserError
from seer_scale.evaluation.datasets.voc import IGNORED, PRESENT, MultiLabelData, open_multi_label
from seer_scale.evaluation.feature_store import stored_features
from seer_scale.evaluation.options import SvmOptions
from seer_scale.evaluation.scores import average_precision, average_precision_11_points
from seer_scale.evaluation.task import Context, Result

Floats = NDArray[np.float32]


Options = SvmOptions


def run(context: Context, options: Options) -> Result:
    """Computes the mean average precision over classes on the test part.

    `map` is the area under the precision-recall steps (scikit-learn's definition); `map_11_points`
    is VOC 2007's own definition.

    Raises:
        DataError: labels or images cannot be used, or a class has too few images.
        UserError: scikit-learn is not installed.
    """
    data = open_multi_label(context.data, context.labels, context.say)
    _check(data, options.folds)
    features = []
    for part in (data.train, data.val):
        stored = stored_features(context, part.images, size=options.size, maps=[options.map])
        features.append(F.normalize(stored[options.map].all(), dim=1).numpy())
    rows: list[dict[str, Any]] = []
    for number in range(distributed.rank(), len(data.classes), distributed.world_size()):
        row = {"number": number, "class": data.classes[number]}
        rows.append({**row, **judge_class(data, number, features[0], features[1], options)})
    rows = sorted(distributed.gather_lists(rows), key=lambda row: int(row.pop("number")))
    return Result(
        metrics={
            "map": float(np.mean([row["ap"] for row in rows])),
            "map_11_points": float(np.mean([row["ap_11_points"] for row in rows])),
        },
        details={
            "per_class": rows,
            "images": {"train": len(data.train.images), "val": len(data.val.images)},
            "classes": len(data.classes),
        },
    )


def judge_class(
    data: MultiLabelData, number: int, train: Floats, val: Floats, options: Options
) -> dict[str, Any]:
    """Returns the cost, both average precisions and the cross-validated one of a class.

    Images marked IGNORED for the class count neither in training nor in the test.

    Args:
        data: marks of both parts.
        number: number of the class.
        train: unit features [N, C] of the training part.
        val: unit features [M, C] of the test part.
        options: options of the task.
    """
    marks, truth = data.train.marks[:, number], data.val.marks[:, number]
    used, judged = marks != IGNORED, truth != IGNORED
    cost, validated = choose_cost(train[used], marks[used], options)
    scores = fit(train[used], marks[used], cost, options).decision_function(val[judged])
    relevant = truth[judged] == PRESENT
    return {
        "ap": average_precision(relevant, scores),
        "ap_11_points": average_precision_11_points(relevant, scores),
        "cost": cost,
        "cross_validated_ap": validated,
    }


def choose_cost(
    features: Floats, marks: NDArray[np.int8], options: Options
) -> tuple[float, float | None]:
    """Returns the cost with the best mean average precision over the folds, and that precision.

    The lowest of equally good costs wins. With a single cost nothing is validated: the precision is
    None.

    Args:
        features: unit features [N, C].
        marks: PRESENT or ABSENT for each image, int8 [N].
        options: options of the task.
    """
    if len(options.costs) == 1:
        return options.costs[0], None
    from sklearn.model_selection import StratifiedKFold

    folds = list(StratifiedKFold(options.folds).split(features, marks))
    best = (-1.0, 0.0)
    for cost in sorted(options.costs):
        found = []
        for kept, held in folds:
            scores = fit(features[kept], marks[kept], cost, options).decision_function(
                features[held]
            )
            found.append(average_precision(marks[held] == PRESENT, scores))
        best = max(best, (float(np.mean(found)), -cost))
    return -best[1], best[0]


def fit(features: Floats, marks: NDArray[np.int8], cost: float, options: Options) -> Any:
    """Fits a scikit-learn `LinearSVC`.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC
    except ImportError:
        raise UserError("the task svm needs scikit-learn: pip install scikit-learn") from None
    classifier = LinearSVC(
        C=cost,
        loss="squared_hinge",
        dual=True,
        class_weight={1: options.positive_weight, -1: 1.0},
        max_iter=options.max_iter,
        random_state=options.seed,
    )
    with warnings.catch_warnings():
        # The protocol stops at max_iter; high costs seldom converge before.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return classifier.fit(features, marks)


def _check(data: MultiLabelData, folds: int) -> None:
    """Refuses a class without enough images to train on, in every fold, or to test on."""
    for number, name in enumerate(data.classes):
        marks, truth = data.train.marks[:, number], data.val.marks[:, number]
        fewest = min(int((marks == sign).sum()) for sign in (PRESENT, -PRESENT))
        if fewest < folds:
            raise DataError(
                f"class {name} has {fewest} training images with or without it, but each of "
                f"{folds} folds needs one: add images or lower folds"
            )
        if not (truth == PRESENT).any():
            raise DataError(
                f"class {name} has no image in the test part, so that its precision is undefined: "
                "add an image or remove the class"
            )
