"""The import job without a worker."""

import pytest
from django.conf import settings

from openpalm.feedback.imports import importer
from openpalm.feedback.models import Job
from openpalm.feedback.worker.progress import Progress


@pytest.fixture
def import_file(project, tmp_path):
    """import_file("prompts.jsonl", text, what="items"): the job's result."""

    def run(name: str, content: str | bytes, **arguments) -> dict:
        folder = settings.FEEDBACK_DIR / "uploads"
        folder.mkdir(exist_ok=True)
        suffix = "." + name.partition(".")[2]
        data = content.encode() if isinstance(content, str) else content
        (folder / f"stored{suffix}").write_bytes(data)
        given = {"what": "prompts", "file": f"stored{suffix}", "name": name} | arguments
        job = Job.objects.create(
            kind="import", project=project, arguments=given, state="running", worker="test"
        )
        return importer.run(job, Progress(job))

    return run
