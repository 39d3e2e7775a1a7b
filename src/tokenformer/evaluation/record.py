"""The JSON file of an evaluation, with all that is needed to judge and repeat it.

| key       | what                                                                                              |
|-----------|---------------------------------------------------------------------------------------------------|
| `kind`    | `perplexity`, `tasks`, `images` or `predictions`                                                  |
| `model`   | `name`, `path` as given, `model_type`, `parameters`, `dtype`; `adapters` with weights if any      |
| `run`     | `date` (UTC), `command`, `device`, `threads`, `hardware`, `versions`                              |
| `results` | perplexity: what `evaluate_sources` returns; tasks: metrics of each task, as lm-eval writes them; |
|           | images: what `evaluate_images` returns; predictions: what `predict_images` returns                |

For tasks, all other keys of lm-eval's own file stand beside these, as it writes them. For images, `data` says which
they were: `source` and `split` as given, `fingerprint`, `limit`.
"""

import json
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tokenformer.errors import UserError
from tokenformer.folders import write_atomically
from tokenformer.hardware import hardware, versions

# Within a string, JSON writes no line break.
_NUMBERS = re.compile(r"\[\n\s+([-+\d.eE,\s]+?)\n\s+\]")


def new_record(kind: str, model: PreTrainedModel, path: str, *, command: str | None, threads: int) -> dict[str, Any]:
    """What the file begins with; results are to be added.

    Args:
        kind: what was done, as in the table above.
        model: that was evaluated.
        path: where it is.
        command: that was given.
        threads: of torch.
    """
    device = model.device
    return {
        "kind": kind,
        "model": {
            "name": Path(path).resolve().name if Path(path).is_dir() else path,
            "path": path,
            "model_type": model.config.model_type,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "run": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": threads,
            "hardware": hardware(),
            "versions": {**versions(), "transformers": metadata.version("transformers")},
        },
    }


def check_target(path: str, option: str = "out", example: str = "eval.json") -> None:
    """Say now, not after hours of evaluating, that a file cannot be written.

    Args:
        path: of the file.
        option: that named it.
        example: of a name.

    Raises:
        UserError: it is a folder, or its folder does not exist.
    """
    if Path(path).is_dir():
        raise UserError(f"{option}: '{path}' is a folder: give a file, such as {Path(path) / example}")
    if not Path(path).parent.is_dir():
        raise UserError(f"{option}: there is no folder '{Path(path).parent}': create it first")


def write_record(record: dict[str, Any], path: str) -> None:
    """Write the file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False)
    # Lists of numbers on one line: a confusion matrix of 1000 classes has a million of them.
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    write_atomically(Path(path), text + "\n")
