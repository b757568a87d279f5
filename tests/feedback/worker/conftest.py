"""A worker without threads of its own, so that its jobs see the test's transaction."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(settings, tmp_path):
    settings.FEEDBACK_HEARTBEAT = False
    settings.FEEDBACK_DIR = tmp_path / "site"
