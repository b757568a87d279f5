"""One server for the tests that leave it as it was, and the engine that answers the same."""

import pytest
from command_line import write_base
from servers import serving

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint of a tiny model that is 128 tokens wide and clear in its choices."""
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
