"""One server for the tests of its HTTP side and of the chat."""

import pytest
import torch
from served import CONTEXT, running

from lively import save_lively_model


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """A folder with a model that goes on for as long as it is asked to, and the model."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    torch.manual_seed(0)
    return folder, save_lively_model(folder, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def server(endless):
    with running(*endless) as served:
        yield served
