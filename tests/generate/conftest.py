"""Tiny models of every kind."""

import sys
from pathlib import Path

import pytest

# Under --import-mode=importlib nothing else lets tests import what they share.
sys.path.insert(0, str(Path(__file__).parent))

from tiny_models import KINDS, tiny


@pytest.fixture(scope="session")
def model():
    return tiny()


@pytest.fixture(scope="session", params=KINDS)
def any_model(request):
    return tiny(**KINDS[request.param])
