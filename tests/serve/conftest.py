"""One server for all tests that do not change it, and an engine with the same model."""

import pytest
from command_line import write_base
from servers import serving

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint of a tiny model with a context of 128 and no close calls between tokens."""
    return write_base(tmp_path_factory.mktemp("served") / "base", context=128, clear=True)


@pytest.fixture(scope="session")
def server(base):
    with serving(base, "--dtype", "float32", "--max-sequences", 8) as running:
        yield running


@pytest.fixture
def call(server):
    """Calls the server; it must be idle again after the test."""
    yield server.call
    server.wait_idle()


@pytest.fixture(scope="session")
def tokenizer(base):
    return Tokenizer.load(base)


@pytest.fixture
def engine(base):
    """The same model, called directly, one sequence at a time."""
    return Engine(checkpoint.load(base), slots=1)
