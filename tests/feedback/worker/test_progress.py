"""What a running job writes, and the room that it leaves for others."""

import pytest
from django.db import connection

from openpalm.feedback.worker import jobs, progress
from openpalm.feedback.worker.identity import worker_name
from openpalm.feedback.worker.progress import Progress


@pytest.mark.parametrize("is_long", [True, False])
def test_labelers_can_write_between_the_transactions_of_a_job(project, monkeypatch, is_long):
    """SQLite's writers do not queue: one that looks every 0.1 s would never find it free."""
    job = jobs.enqueue("import", project=project)
    jobs.take(worker_name(), jobs.KINDS)
    job.refresh_from_db()
    slept = []
    monkeypatch.setattr(progress, "PAUSE_AFTER_S", -1.0 if is_long else 1e9)
    monkeypatch.setattr(progress.time, "sleep", slept.append)
    reported = Progress(job)
    for _ in range(3):
        with reported.writing():
            pass
    pauses = 3 if is_long and connection.vendor == "sqlite" else 0
    assert slept == [progress.PAUSE_S] * pauses
