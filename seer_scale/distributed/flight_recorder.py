"""torch's record of the last collectives of a rank, under gloo and NCCL.

torch keeps the record by itself; here it is switched on, put into words and written, as the JSON
that torch makes of it.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

# torch reads either of these for the first process group; the second is the older name.
VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
CALLS = "2000"  # collectives that a rank remembers
SECONDS = 10.0  # that a record may take: the driver or the disk may be what hangs


def switch_on() -> None:
    """Makes torch remember collectives, unless the user has set either of `VARIABLES`."""
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = CALLS


def present() -> str:
    """Says which collective this rank is in, or which one it ended last; '' if torch has no record.

    A rank on a GPU may have asked for many collectives ahead: it is in the oldest.
    """
    try:
        calls = json.loads(_trace() or "{}").get("entries", [])
    except Exception:  # torch's own trouble with its record must not pass for a lost store
        return ""
    for call in calls:
        if not call["retired"] and call["state"] != "completed":
            return f"in {_words(call)}"
    return f"in none, after {_words(calls[-1])}" if calls else ""


def write(folder: Path, rank: int) -> str | None:
    """Writes this rank's record into `folder`; returns why it could not, or None.

    Args:
        folder: folder of the records of all ranks; made if it does not exist.
        rank: number of this rank.
    """
    problems = [f"it took longer than {SECONDS:.0f} s"]

    def work() -> None:
        try:
            trace = _trace()
            if trace is None:
                raise OSError("this torch keeps none")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"rank_{rank}.json").write_bytes(trace)
            problems.clear()
        except Exception as error:  # whatever it is, the watchdog has to end the run
            problems[:] = [getattr(error, "strerror", None) or str(error)]

    thread = threading.Thread(target=work, name="flight-recorder", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return problems[0] if problems else None


def _trace() -> bytes | None:
    recorder = "nccl" if dist.get_backend() == "nccl" else "fr"
    dump: Any = getattr(_distributed_c10d, f"_dump_{recorder}_trace_json", None)
    return bytes(dump()) if dump else None


def _words(call: dict[str, Any]) -> str:
    """Names a collective: kind, number within its group, group, and sizes of its tensors."""
    kind = call["profiling_name"].partition(":")[2] or call["profiling_name"]
    number, description = call["process_group"]
    group = f"group {number}" + (f" ({description})" if description != "undefined" else "")
    sizes = " ".join(str(list(size)).replace(" ", "") for size in call["input_sizes"][:3])
    return f"{kind} {call['collective_seq_id']} of {group} on {sizes or 'nothing'}"
