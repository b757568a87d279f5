"""Every kind of job while its worker is killed and frozen: feedback_kills.py in small."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "feedback_kills.py"
OURS = ("DATABASE_URL", "DJANGO_SETTINGS_MODULE", "OPENPALM_")


def test_everything_is_there_once(database_url):
    words = [sys.executable, str(SCRIPT), "--kills", "5", "--freezes", "1", "--prompts", "40"]
    words += ["--url", database_url] if database_url else []
    environment = {name: text for name, text in os.environ.items() if not name.startswith(OURS)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    # A fast machine has done the work before all ends are reached.
    assert re.match(r"[1-6] ends of the worker", done.stdout), done.stdout
