"""Starting several processes as a user does, with torchrun; each on one thread."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Run a script or a module (`-m NAME`) in so many processes; fails with their output unless it ends as expected."""

    def run(
        processes: int, *command: str, restarts: int = 0, fails: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        # A rendezvous of its own on a port that is free.
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
        environment = os.environ | {
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENFORMER_TIMEOUT": "120",
            **variables,
        }
        done = subprocess.run(
            [*torchrun, "--nproc-per-node", str(processes), *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert (done.returncode != 0) == fails, done.stderr[-6000:]
        return done

    return run
