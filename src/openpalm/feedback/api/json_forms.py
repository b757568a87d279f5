"""Rows of the database as the JSON of the API."""

from typing import Any

from openpalm.feedback.models import Candidate, Item, ModelVersion, Project, Response, TrainRun


def project_json(project: Project, role: str) -> dict[str, Any]:
    guideline = project.guideline
    return {
        "slug": project.slug,
        "name": project.name,
        "task": project.task,
        "scale": project.scale,
        "axes": project.axes,
        "overlap": project.overlap,
        "gold_share": project.gold_share,
        "repeat_share": project.repeat_share,
        "blind": project.blind,
        "lease_minutes": project.lease_minutes,
        "open": project.open,
        "guideline_version": guideline.version if guideline else None,
        "role": role,
        "created": project.created_at.isoformat(),
    }


def item_json(item: Item, *, is_revealed: bool) -> dict[str, Any]:
    """The models' names only to those who cannot be given the item to judge any more."""
    return {
        "id": item.pk,
        "key": item.key,
        "messages": item.prompt.messages,
        "source": item.prompt.source,
        "candidates": [_candidate_json(p.candidate, is_revealed) for p in item.places.all()],
        "purpose": item.purpose if is_revealed else None,
        "arm": item.arm or None,
        "priority": item.priority,
        "needed": item.needed,
        "taken": item.taken,
        "submitted": item.submitted,
        "state": item.state,
        "created": item.created_at.isoformat(),
    }


def _candidate_json(candidate: Candidate, is_revealed: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"text": candidate.text}
    if is_revealed:
        shown["model"] = candidate.model.name if candidate.model else None
        shown["checkpoint"] = candidate.checkpoint or None
        shown["sampling"] = candidate.sampling
    return shown


def response_json(response: Response, *, is_revealed: bool) -> dict[str, Any]:
    """`payload` numbers the candidates as the item lists them."""
    return {
        "id": str(response.uid),
        "item": response.item_id,
        "author": response.user.username,
        "author_kind": response.author_kind,
        "state": response.state,
        "in_force": response.in_force,
        "kind": response.kind,
        "payload": response.payload if is_revealed else None,
        "reason": response.reason if is_revealed else None,
        "picked_place": response.picked_place if is_revealed else None,
        "elapsed_ms": response.elapsed_ms,
        "guideline_version": response.guideline_version,
        "created": response.created_at.isoformat(),
    }


def run_json(run: TrainRun) -> dict[str, Any]:
    return {
        "id": run.pk,
        "verb": run.verb,
        "state": run.state,
        "snapshot": run.snapshot.digest if run.snapshot else None,
        "parent": run.parent.name if run.parent else None,
        "reward_model": run.reward_model.name if run.reward_model else None,
        "settings": run.settings,
    }


def model_json(model: ModelVersion) -> dict[str, Any]:
    return {
        "id": model.pk,
        "name": model.name,
        "kind": model.kind,
        "checkpoint": model.checkpoint or None,
        "parent": model.parent.name if model.parent else None,
        "run": model.run_id,
        "served": model.project.served_id == model.pk,
        "created": model.created_at.isoformat(),
    }
