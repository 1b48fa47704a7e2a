"""Transfer to any labelled set (iNaturalist 2018, Places205): a linear probe, or fine-tuning."""

from __future__ import annotations

from seer_scale.config.schema import build
from seer_scale.evaluation.options import FinetuneOptions, LinearOptions, TransferOptions
from seer_scale.evaluation.task import Context, Result
from seer_scale.evaluation.tasks import finetune, linear

Options = TransferOptions


def run(context: Context, options: Options) -> Result:
    """Runs the task that `method` names on the context's data, with that task's own options.

    Raises:
        ConfigError: an option does not exist, or its value is not allowed.
    """
    where = f"transfer with method={options.method}: options."
    if options.method == "finetune":
        return finetune.run(context, build(FinetuneOptions, options.options, where=where))
    return linear.run(context, build(LinearOptions, options.options, where=where))
