"""`tokenformer ...`, in which process 1 is killed in the midst of its sixth step, the first time that it is started."""

import os
import signal
import sys
from typing import Any

import torch

from tokenformer.cli import main
from tokenformer.training.trainer import LanguageTrainer

training_step = LanguageTrainer.training_step


def step(self: LanguageTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kwargs)


LanguageTrainer.training_step = step

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
