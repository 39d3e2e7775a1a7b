"""`tokenformer ...`, disturbed as the environment says.

SIGNAL: process 1 gets this signal in the midst of its sixth step, the first time that it is started; when it was sent
is written to the file in SENT. POISON: the loss of a pass that reads training row number POISON is no number.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tokenformer.cli import main
from tokenformer.data import PreparedData
from tokenformer.training.trainer import LanguageTrainer

training_step, compute_loss = LanguageTrainer.training_step, LanguageTrainer.compute_loss


def signalled(self: LanguageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A step in which process 1 sends itself a signal."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and self.state.global_step == 5:
        Path(os.environ["SENT"]).write_text(str(time.time()))
        os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])
    return training_step(self, *args, **kwargs)


def poisoned(row: int, data: str) -> Any:
    """A loss that is no number where row `row` of a prepared folder is read."""
    bad = torch.tensor(PreparedData.load(data).train[row]["input_ids"])

    def loss(self: LanguageTrainer, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        found = (inputs["input_ids"] == bad).all(-1).any()
        return compute_loss(self, model, inputs, *args, **kwargs) + (torch.nan if found else 0.0)

    return loss


if __name__ == "__main__":
    if "SIGNAL" in os.environ:
        LanguageTrainer.training_step = signalled  # type: ignore[method-assign]  # what this file is for
    if "POISON" in os.environ:
        row, data = os.environ["POISON"].split(" ", 1)
        LanguageTrainer.compute_loss = poisoned(int(row), data)  # type: ignore[method-assign]  # likewise
    sys.exit(main(sys.argv[1:]))
