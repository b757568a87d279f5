"""The OpenAPI document of the REST API, and the list of its URLs.

Paths, methods and scopes come from the URL list, so that no endpoint is missing; summaries from the
handlers' docstrings; bodies and parameters are written here.
"""

import re
from typing import Any

from django.http import HttpRequest, JsonResponse
from django.urls import URLPattern
from django.views.decorators.http import require_GET

from openpalm.feedback.accounts.access import public_page

TEXT, WHOLE, NUMBER, FLAG = ({"type": t} for t in ("string", "integer", "number", "boolean"))
OBJECT: dict[str, Any] = {"type": "object"}
MESSAGES = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"role": {"enum": ["system", "user", "assistant"]}, "content": TEXT},
        "required": ["role", "content"],
    },
}
CANDIDATE = {
    "type": "object",
    "properties": {"text": TEXT, "model": TEXT, "checkpoint": TEXT, "sampling": OBJECT},
    "required": ["text"],
}
ITEM = {
    "type": "object",
    "properties": {
        "key": TEXT,
        "prompt": TEXT,
        "messages": MESSAGES,
        "candidates": {"type": "array", "items": CANDIDATE},
        "priority": NUMBER,
        "needed": WHOLE,
        "gold": OBJECT,
    },
    "required": ["candidates"],
}
PROMPT = {
    "type": "object",
    "properties": {"prompt": TEXT, "messages": MESSAGES, "held_out": FLAG},
}
ANSWERING = {
    "type": "object",
    "properties": {"model": TEXT, "n": WHOLE, "sampling": OBJECT},
    "required": ["model"],
}
Properties = dict[str, dict[str, Any]]
TIMED: Properties = {"elapsed_ms": WHOLE, "guideline_version": WHOLE}
JUDGED: Properties = {"payload": OBJECT, **TIMED}
BODIES: dict[tuple[str, str], tuple[Properties, list[str]]] = {
    ("projects", "POST"): (
        {
            "slug": TEXT,
            "name": TEXT,
            "task": TEXT,
            "scale": WHOLE,
            "axes": {"type": "array", "items": TEXT},
            "overlap": WHOLE,
            "gold_share": NUMBER,
            "repeat_share": NUMBER,
            "blind": FLAG,
            "lease_minutes": WHOLE,
            "decided_by": TEXT,
            "guidelines": TEXT,
        },
        ["slug", "name"],
    ),
    ("items", "POST"): (
        {"project": TEXT, "items": {"type": "array", "maxItems": 500, "items": ITEM}},
        ["project", "items"],
    ),
    ("prompts", "POST"): (
        {
            "project": TEXT,
            "prompts": {"type": "array", "maxItems": 500, "items": PROMPT},
            "held_out_share": NUMBER,
        },
        ["project", "prompts"],
    ),
    ("prompts/{prompt_id}/held-out", "POST"): ({"held_out": FLAG}, ["held_out"]),
    ("projects/{slug}/generate", "POST"): (
        {
            "models": {"type": "array", "maxItems": 20, "items": ANSWERING},
            "prompts": {"type": "array", "items": WHOLE},
            "count": WHOLE,
            "pairs": WHOLE,
        },
        ["models"],
    ),
    ("projects/{slug}/next-batch", "POST"): ({"size": WHOLE}, []),
    ("projects/{slug}/next", "POST"): ({}, []),
    ("projects/{slug}/undo", "POST"): ({}, []),
    ("assignments/{assignment_id}/submit", "POST"): (JUDGED, ["payload"]),
    ("assignments/{assignment_id}/change", "POST"): (JUDGED, ["payload"]),
    ("assignments/{assignment_id}/draft", "POST"): ({"payload": OBJECT}, ["payload"]),
    ("assignments/{assignment_id}/skip", "POST"): ({"reason": TEXT, **TIMED}, []),
    ("assignments/{assignment_id}/flag", "POST"): (
        {"reason": TEXT, "candidate": WHOLE, **TIMED},
        ["reason"],
    ),
    ("projects/{slug}/conversations", "POST"): (
        {
            "store": FLAG,
            "messages": MESSAGES,
            "answer": TEXT,
            "model": TEXT,
            "checkpoint": TEXT,
            "sampling": OBJECT,
            "created": NUMBER,
        },
        ["store", "messages", "answer"],
    ),
    ("runs", "POST"): (
        {
            "project": TEXT,
            "verb": TEXT,
            "parent": TEXT,
            "reward_model": TEXT,
            "author_kinds": {"type": "array", "items": TEXT},
            "hold_back": FLAG,
            "comparisons": FLAG,
            "settings": OBJECT,
        },
        ["project", "verb", "parent"],
    ),
    ("runs/{run_id}/stop", "POST"): ({}, []),
    ("runs/{run_id}/resume", "POST"): ({}, []),
    ("models", "POST"): (
        {"project": TEXT, "path": TEXT, "name": TEXT, "kind": TEXT},
        ["project", "path", "name"],
    ),
    ("models/{model_id}/choose", "POST"): ({}, []),
    ("models/{model_id}/score", "POST"): ({}, []),
    ("models/{model_id}/promote", "POST"): ({"comparison": WHOLE, "override_reason": TEXT}, []),
    ("comparisons", "POST"): (
        {"project": TEXT, "model": TEXT, "size": WHOLE, "sampling": OBJECT},
        ["project", "model"],
    ),
    ("comparisons/{comparison_id}/extend", "POST"): ({"further": WHOLE}, ["further"]),
    ("promotions/{promotion_id}/undo", "POST"): ({}, []),
    ("jobs/{job_id}/stop", "POST"): ({}, []),
}
PAGED = ("after", "limit")
WHOLES = (*PAGED, "item", "version")
QUERIES: dict[str, tuple[str, ...]] = {
    "projects": PAGED,
    "projects/{slug}/guidelines": ("version",),
    "projects/{slug}/statistics": ("name",),
    "prompts": ("project", "source", "held_out", *PAGED),
    "items": ("project", "state", *PAGED),
    "responses": ("project", "item", "author", *PAGED),
    "responses/export": ("project", "format", "consensus"),
    "runs": ("project", *PAGED),
    "models": ("project", *PAGED),
    "snapshots/{snapshot_id}/judgements": PAGED,
    "comparisons": ("project", *PAGED),
    "promotions": ("project", *PAGED),
    "jobs": ("project", "state", *PAGED),
}
ERROR = {
    "description": "refused; `field` names what is wrong in the request",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "error": {
                        "type": "object",
                        "properties": {
                            "code": TEXT,
                            "message": TEXT,
                            "field": {"type": ["string", "null"]},
                        },
                        "required": ["code", "message", "field"],
                    }
                },
                "required": ["error"],
            }
        }
    },
}


def document(patterns: list[Any]) -> dict[str, Any]:
    """The document for the URL patterns of the API."""
    paths: dict[str, Any] = {}
    for pattern in patterns:
        operations = getattr(pattern.callback, "operations", None)
        if isinstance(pattern, URLPattern) and operations:
            route = str(pattern.pattern)
            path = re.sub(r"<\w+:(\w+)>", r"{\1}", route)
            paths[f"/{path}"] = {
                method.lower(): _operation(path, route, method, one)
                for method, one in operations.items()
            }
    return {
        "openapi": "3.1.0",
        "info": {"title": "OpenPaLM feedback", "version": "1"},
        "servers": [{"url": "/api/v1"}],
        "security": [{"token": []}],
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "paths": paths,
    }


def _operation(path: str, route: str, method: str, one: Any) -> dict[str, Any]:
    handler = one.handler
    words = handler.__name__.replace("_", " ")
    first = (handler.__doc__ or words).strip().partition("\n\n")[0]
    described: dict[str, Any] = {
        "operationId": handler.__name__,
        "summary": " ".join(first.split()),
        "description": f"Needs the scope `{one.scope}` and the role {one.least} or above.",
        "parameters": _parameters(path, route, method),
        "responses": {"2XX": {"description": "done"}, "4XX": ERROR},
    }
    if (path, method) in BODIES:
        properties, required = BODIES[path, method]
        schema = {"type": "object", "properties": properties, "additionalProperties": False}
        schema |= {"required": required} if required else {}
        described["requestBody"] = {
            "required": bool(required),
            "content": {"application/json": {"schema": schema}},
        }
    return described


def _parameters(path: str, route: str, method: str) -> list[dict[str, Any]]:
    found = [
        {"name": name, "in": "path", "required": True, "schema": WHOLE if kind == "int" else TEXT}
        for kind, name in re.findall(r"<(\w+):(\w+)>", route)
    ]
    if method != "GET":
        return found
    for name in QUERIES.get(path, ()):
        schema = WHOLE if name in WHOLES else TEXT
        found.append({"name": name, "in": "query", "required": name == "project", "schema": schema})
    return found


@require_GET
@public_page
def openapi(request: HttpRequest) -> JsonResponse:
    from openpalm.feedback.api.urls import urlpatterns

    return JsonResponse(document(urlpatterns))


@require_GET
@public_page
def index(request: HttpRequest) -> JsonResponse:
    """The URLs of the API, each with its methods."""
    from openpalm.feedback.api.urls import urlpatterns

    paths = document(urlpatterns)["paths"]
    urls = {f"/api/v1{path}": [m.upper() for m in methods] for path, methods in paths.items()}
    return JsonResponse({"openapi": "/api/v1/openapi.json", "urls": urls})
