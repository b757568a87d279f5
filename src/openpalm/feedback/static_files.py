"""URLs of scripts and styles that change with each release.

Browsers keep these files for an hour. A page of a new release must not run with the old ones.
"""

from typing import Any

from django.contrib.staticfiles.storage import StaticFilesStorage

from openpalm import __version__


class VersionedStorage(StaticFilesStorage):
    def url(self, name: Any) -> str:
        return f"{super().url(name)}?v={__version__}"
