"""The session every test runs in: fixed threads and seeds, no network, uninitialised memory full of NaN."""

import os
import random
import shutil
import tempfile

import hypothesis
import pytest

THREADS = os.environ.get("TOKENFORMER_TEST_THREADS", "2")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "MPLBACKEND": "Agg"}

# Read once, when torch, transformers and matplotlib are first imported; the programs that tests start inherit them.
os.environ.update(OFFLINE, OMP_NUM_THREADS=THREADS, MKL_NUM_THREADS=THREADS)

hypothesis.settings.register_profile("tokenformer", deadline=None, derandomize="CI" in os.environ, print_blob=True)
hypothesis.settings.load_profile("tokenformer")


def pytest_configure(config: pytest.Config) -> None:
    """Give the session an empty Hugging Face cache, so that no test reads the user's."""
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist inherit it
        cache = tempfile.mkdtemp(prefix="tokenformer-tests-")
        os.environ["HF_HOME"] = cache
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Start every test, fixtures included, from the same state, whatever the one before it changed."""
    import numpy as np
    import torch

    torch.set_num_threads(int(THREADS))
    # Deterministic mode fills what torch.empty returns with NaN (integers: the largest value), so that a read of memory
    # nobody wrote shows. Operators without a deterministic version only warn.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
