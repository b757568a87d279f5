"""One server that the clients share, and the same model called directly."""

import pytest
from command_line import write_base
from servers import serving

from openpalm.checkpoint import directory as checkpoint
from openpalm.data.text.tokenizer import Tokenizer
from openpalm.generate.engine import Engine


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint of a tiny model that is clear in its choices."""
    return write_base(tmp_path_factory.mktemp("served") / "base", context=512, clear=True)


@pytest.fixture(scope="session")
def shared_server(base):
    with serving(base, "--dtype", "float32", "--max-sequences", 8) as running:
        yield running


@pytest.fixture
def server(shared_server):
    """Takes any key; it must be idle again after the test."""
    yield shared_server
    shared_server.wait_idle()


@pytest.fixture(scope="session")
def tokenizer(base):
    return Tokenizer.load(base)


@pytest.fixture(scope="session")
def engine(base):
    return Engine(checkpoint.load(base), slots=1)
