"""Which server answers for a model: the site's own, or one started for a job and ended after it."""

import json
import re
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from django.conf import settings

from openpalm.base.files import write_atomically
from openpalm.errors import DataError, WorkError
from openpalm.feedback.model_server import (
    SERVED_FILE,
    ModelServer,
    promoted_path,
    site_server,
)
from openpalm.feedback.models import ModelVersion
from openpalm.feedback.worker.processes import POLL_S, Command, end
from openpalm.feedback.worker.progress import Progress

LOAD_TIMEOUT_S = 600.0
_READY = re.compile(r"chat page at (http://\S+?)/,")


def write_served(model: ModelVersion) -> None:
    """Names the model for the process that starts the server next. Raises OSError."""
    content = {"path": model.path, "project": model.project.slug, "model": model.name}
    write_atomically(Path(settings.FEEDBACK_DIR) / SERVED_FILE, json.dumps(content))


def forget_promotion() -> None:
    (Path(settings.FEEDBACK_DIR) / SERVED_FILE).unlink(missing_ok=True)


def _has(model: ModelVersion) -> bool:
    """Whether the site's server has this model: another project may have promoted one since."""
    return model.pk == model.project.served_id and promoted_path() in (None, model.path)


@contextmanager
def serving(model: ModelVersion, progress: Progress) -> Iterator[ModelServer]:
    """A server of this model: the site's, if that is the model it serves, or a temporary one."""
    server = site_server()
    if server is not None and _has(model):
        yield replace(server, checkpoint=model.path)
        return
    if not model.path:
        raise DataError(f"the model {model} is known by its answers only; it has no checkpoint")
    with temporary_server(model.path, progress) as server:
        yield server


@contextmanager
def temporary_server(path: str, progress: Progress) -> Iterator[ModelServer]:
    """`openpalm serve PATH` on a free port of this machine, ended at the end of the block."""
    folder = Path(settings.FEEDBACK_DIR) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="serve-", suffix=".log") as log:
        key = secrets.token_urlsafe(24)
        # Through the environment: other users of the machine can read command lines.
        keys = {"OPENPALM_API_KEY": key, "OPENPALM_ADMIN_KEY": secrets.token_urlsafe(24)}
        words = ["serve", path, "--port", "0", "--shutdown-timeout", "1"]
        command = Command(words, Path(log.name), keys, dies_with_us=True)
        process = command.start()
        try:
            progress.say(f"loading {path}")
            waited = 0.0
            while not (
                ready := _READY.search(Path(log.name).read_text(encoding="utf-8", errors="replace"))
            ):
                if process.poll() is not None or waited > LOAD_TIMEOUT_S:
                    reason = command.last_line() or f"no answer in {LOAD_TIMEOUT_S:.0f} s"
                    raise WorkError(f"{path} cannot be served: {reason}")
                progress.wait(POLL_S)
                waited += POLL_S
            yield ModelServer(ready[1], key)
        finally:
            end(process, wait_s=10)
