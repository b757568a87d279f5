"""The tests of `make test` pass with PostgreSQL too: there they run with SQLite."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_fast_tests_pass_with_postgresql(postgresql, tmp_path):
    with postgresql.database() as url:
        words = ["-m", "pytest", "tests/feedback", "-p", "no:cacheprovider", "--basetemp", tmp_path]
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | {"DATABASE_URL": url},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
    # Django's tests make a database of their own next to the one that is named.
    assert f'CREATE DATABASE "test_{url.rpartition("/")[2]}"' in postgresql.log()
