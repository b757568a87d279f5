"""Django's management commands, for `openpalm feedback manage` and for tests."""

import os
from collections.abc import Sequence


def manage(arguments: Sequence[str]) -> None:
    """Runs a management command such as ["migrate"]."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "openpalm.feedback.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(["openpalm feedback manage", *arguments])
