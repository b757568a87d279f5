"""Rows of the database as the JSON of the API."""

from datetime import datetime
from typing import Any

from openpalm.feedback.models import (
    Candidate,
    Comparison,
    Item,
    Job,
    ModelVersion,
    Project,
    Promotion,
    Prompt,
    Response,
    Snapshot,
    TrainRun,
)


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
        "decided_by": project.decided_by,
        "served": project.served_id,
        "open": project.open,
        "guideline_version": guideline.version if guideline else None,
        "role": role,
        "created": project.created_at.isoformat(),
    }


def prompt_json(prompt: Prompt) -> dict[str, Any]:
    return {
        "id": prompt.pk,
        "messages": prompt.messages,
        "source": prompt.source,
        "held_out": prompt.held_out,
        "shared_with_consent": prompt.shared_with_consent,
        "created": prompt.created_at.isoformat(),
    }


def item_json(item: Item, *, is_revealed: bool) -> dict[str, Any]:
    """Model names are included only if the user cannot judge the item any more."""
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


def run_json(run: TrainRun, *, is_admin: bool) -> dict[str, Any]:
    return {
        "id": run.pk,
        "verb": run.verb,
        "state": run.state,
        "snapshot": run.snapshot.digest if run.snapshot else None,
        "parent": run.parent.name if run.parent else None,
        "reward_model": run.reward_model.name if run.reward_model else None,
        "settings": run.settings,
        "step": run.step,
        "steps": run.steps,
        "figures": run.figures,
        "alarms": run.alarms,
        # Only admins see paths on the server, as on the page.
        "failure": (run.error if is_admin else run.error.partition(" (log: ")[0]) or None,
        "created": run.created_at.isoformat(),
        "started": _time(run.started_at),
        "finished": _time(run.finished_at),
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


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "id": snapshot.pk,
        "digest": snapshot.digest,
        "judgements": snapshot.judgements,
        "counts": snapshot.counts,
        "created": snapshot.created_at.isoformat(),
    }


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """The figures so far, and once all pairs are judged the decision with its reason."""
    result: dict[str, Any] = comparison.result
    figures: dict[str, Any] = result.get("figures") or {}
    names = ("win_rate", "at_equal_style", "left_share", "outcomes", "judgements")
    return {
        "id": comparison.pk,
        "challenger": comparison.challenger.name,
        "served": comparison.served.name,
        "state": comparison.state,
        "size": comparison.size,
        "sampling": result.get("sampling", {}),
        "author_kind": result.get("author_kind"),
        "comparisons": result.get("comparisons", 0),
        "needed": result.get("needed"),
        "decision": result.get("decision"),
        "reason": result.get("reason"),
        **{name: figures.get(name) for name in names},
        "created": comparison.created_at.isoformat(),
        "computed": _time(comparison.computed_at),
    }


def promotion_json(promotion: Promotion) -> dict[str, Any]:
    return {
        "id": promotion.pk,
        "model": promotion.model_id,
        "previous": promotion.previous_id,
        "comparison": promotion.comparison_id,
        "state": promotion.state,
        "override_reason": promotion.override_reason or None,
        "failure": promotion.error or None,
        "by": promotion.by.username,
        "created": promotion.created_at.isoformat(),
        "done": _time(promotion.done_at),
        "undone": _time(promotion.undone_at),
    }


def job_json(job: Job) -> dict[str, Any]:
    return {
        "id": job.pk,
        "kind": job.kind,
        "state": job.state,
        "done": job.done,
        "total": job.total,
        "message": job.message,
        "result": job.result,
        "created": job.created_at.isoformat(),
        "started": _time(job.started_at),
        "finished": _time(job.finished_at),
    }


def _time(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None
