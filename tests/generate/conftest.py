"""Tiny models of every kind."""

import pytest
from tiny_models import KINDS, tiny


@pytest.fixture(scope="session")
def model():
    return tiny()


@pytest.fixture(scope="session", params=KINDS)
def any_model(request):
    return tiny(**KINDS[request.param])
