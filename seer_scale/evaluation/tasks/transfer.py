"""Transfer to any labelled set (iNaturalist 2018, Places205): a linear probe, or all fine-tuned."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from seer_scale.errors import UserError
from seer_scale.evaluation.task import Context, Result, TaskOptions
from seer_scale.evaluation.tasks import finetune

_T = TypeVar("_T", bound=TaskOptions)


class Options(TaskOptions):
    """Of `transfer`."""

    method: Literal["linear", "finetune"] = Field(
        "linear", description="a probe on frozen features, or fine-tuning of everything"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="of that task, e.g. {epochs: 14, lr_steps: [4, 8, 12]}"
    )


def run(context: Context, options: Options) -> Result:
    """Runs the task that `method` names on the context's data, with its own options.

    Raises:
        UserError: if an option is not one of that task.
    """
    if options.method == "finetune":
        return finetune.run(context, _options_of(finetune.Options, options))
    from seer_scale.evaluation.tasks import linear

    return linear.run(context, _options_of(linear.Options, options))


def _options_of(kind: type[_T], options: Options) -> _T:
    try:
        return kind(**options.options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "options"
        raise UserError(
            f"transfer with method={options.method}: {name} is not possible ({first['msg']}); "
            f"{options.method} takes {', '.join(kind.model_fields)}"
        ) from None
