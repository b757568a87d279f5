"""What some tests need from the machine: a browser, a database server.

Where it is missing they are skipped, unless a variable of the environment says that it must be
there: `.ci/run` sets both where it is root and can install them.
"""

import os
from typing import NoReturn

import pytest

BROWSER = "OPENPALM_REQUIRE_BROWSER"
POSTGRESQL = "OPENPALM_REQUIRE_POSTGRESQL"


def leave_out(reason: str, variable: str) -> NoReturn:
    """Skips the running test, or fails it where `variable` is 1."""
    if os.environ.get(variable) == "1":
        pytest.fail(f"{reason} ({variable} is 1: this test must run)", pytrace=False)
    pytest.skip(reason)
