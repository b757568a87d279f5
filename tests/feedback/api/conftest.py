"""A caller of the API."""

import json

import pytest
from django.test import Client

from openpalm.feedback.accounts import tokens
from openpalm.feedback.models import ApiToken


class Caller:
    """Calls the API with a token; returns the response, with `.data` its JSON."""

    def __init__(self, token: str, **options):
        self.client = Client(enforce_csrf_checks=True, **options)
        self.headers = {"Authorization": f"Bearer {token}"}

    def get(self, path, **query):
        return self._read(self.client.get(f"/api/v1/{path}", query, headers=self.headers))

    def post(self, path, body=None, content=None, content_type="application/json"):
        content = json.dumps(body or {}) if content is None else content
        sent = self.client.post(
            f"/api/v1/{path}", content, content_type=content_type, headers=self.headers
        )
        return self._read(sent)

    def delete(self, path):
        return self._read(self.client.delete(f"/api/v1/{path}", headers=self.headers))

    @staticmethod
    def _read(response):
        if not response.streaming:
            response.data = json.loads(response.content)
        return response


@pytest.fixture
def caller():
    """caller(user, "scope", ...): with all scopes if none is given."""

    def make(user, *scopes, **limits) -> Caller:
        return Caller(tokens.issue(user, "test", scopes or ApiToken.SCOPES, **limits))

    return make
