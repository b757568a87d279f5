"""Promotion: the server serves another model, without dropping a request, and back again.

A model is promoted after a decided comparison with the served model, or by an override with a
reason, which the audit log keeps. If the server refuses, the old model stays and the reason is
stored.
"""

import logging
from typing import Any

from django.db import transaction
from django.utils import timezone

from openpalm.errors import DataError, OpenPalmError, WorkError, one_line
from openpalm.feedback.accounts import audit
from openpalm.feedback.judgements.words import AUTHORS
from openpalm.feedback.model_server import ModelServer, NoAnswerError, site_server
from openpalm.feedback.models import Comparison, Job, ModelVersion, Project, Promotion, User
from openpalm.feedback.statistics.promotion import MINIMUM
from openpalm.feedback.training.comparisons import judgements_left
from openpalm.feedback.training.registry import POLICY
from openpalm.feedback.training.servers import promoted_path, write_served
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.processes import POLL_S
from openpalm.feedback.worker.progress import JobStopped, Progress

log = logging.getLogger(__name__)
State = Promotion.State
MIN_REASON = 10


def refusal(comparison: Comparison | None, model: ModelVersion) -> str:
    """Why this comparison does not promote the model; empty if it does."""
    if comparison is None:
        return "no comparison with the served model"
    result = comparison.result
    if comparison.challenger_id != model.pk:
        return f"the comparison is of the model {comparison.challenger}"
    if comparison.state == Comparison.State.FAILED:
        return f"the comparison failed ({result.get('reason') or 'see its job'}); start another one"
    if comparison.state != Comparison.State.DECIDED:
        return f"the comparison is not decided yet: {result.get('reason') or comparison.state}"
    if comparison.served_id != comparison.project.served_id:
        return f"the served model is another one now than {comparison.served} of the comparison"
    if (result.get("comparisons") or 0) < MINIMUM:
        return f"{result.get('comparisons') or 0} comparisons; {MINIMUM} are needed"
    kind = result.get("author_kind", User.Kind.PERSON)
    if kind != comparison.project.decided_by:
        decides = AUTHORS[comparison.project.decided_by]
        return f"it was judged by {AUTHORS[kind]}; in this project {decides} decide"
    counted = (result.get("figures") or {}).get("judgements")
    if counted is not None and (left := judgements_left(comparison)) != counted:
        return f"{left} of the {counted} judgements that decided it are left; compare again"
    if result.get("decision") != "promote" or (result.get("low") or 0) <= 0.5:
        return result.get("reason", "").rstrip(".") or "the interval is not above one half"
    return ""


def can_choose(project: Project, model: ModelVersion) -> bool:
    """The first served model of a project needs no comparison, if no server has one already."""
    return project.served_id is None and site_server() is None and model.kind == POLICY


def choose(project: Project, model: ModelVersion, user: User) -> None:
    """Names the first served model, which later ones are compared with. Raises DataError."""
    if not can_choose(project, model) or not model.path:
        raise DataError("only the first served model is chosen by hand; promote another one")
    # Conditional: of two managers at the same time only one chooses.
    if Project.objects.filter(pk=project.pk, served=None).update(served=model):
        audit.record("model.served", user=user, project=project, target=model)


@transaction.atomic
def propose(
    project: Project,
    model: ModelVersion,
    user: User,
    *,
    comparison: Comparison | None = None,
    override_reason: str = "",
) -> Promotion:
    """Queues the promotion. Raises DataError with the reason if it is refused."""
    reason = override_reason.strip()
    if model.project_id != project.pk or model.kind != POLICY or not model.path:
        raise DataError(f"the model {model} cannot be served: it has no checkpoint here")
    _check_server()
    _check_free(project)
    if model.pk == project.served_id:
        raise DataError(f"the model {model} is served already")
    if comparison is not None:
        comparison.refresh_from_db()
        comparison.project = project
    if (why := refusal(comparison, model)) and len(reason) < MIN_REASON:
        raise DataError(f"refused: {why}. To promote it anyway, give a reason")
    promotion = Promotion.objects.create(
        project=project,
        model=model,
        previous=project.served,
        comparison=comparison,
        override_reason=reason if why else "",
        by=user,
    )
    jobs.enqueue("promote", project=project, user=user, promotion=promotion.pk)
    data = {"refused_because": why, "reason": reason} if why else {}
    action = "model.promotion_overridden" if why else "model.promotion_proposed"
    audit.record(action, user=user, project=project, target=model, promotion=promotion.pk, **data)
    return promotion


@transaction.atomic
def undo(promotion: Promotion, user: User) -> Job:
    """Queues the return to the model before. Raises DataError if there is none."""
    _check_server()
    _check_free(promotion.project)
    promotion.refresh_from_db(fields=["state"])
    if promotion.state != State.DONE or promotion.project.served_id != promotion.model_id:
        raise DataError("only the promotion of the model that is served now can be undone")
    if promotion.previous is None or not promotion.previous.path:
        raise DataError("there is no model before it to return to")
    audit.record(
        "model.promotion_undo_asked",
        user=user,
        project=promotion.project,
        target=promotion.model,
        promotion=promotion.pk,
    )
    return jobs.enqueue(
        "promote", project=promotion.project, user=user, promotion=promotion.pk, undo=True
    )


def _check_free(project: Project) -> None:
    """Raises DataError while a swap waits: its comparison was with the model served before it.

    The lock makes of two requests at the same time one that waits and one that is refused. The
    project has the served model and the rule of this moment afterwards.
    """
    Project.objects.select_for_update(no_key=True).get(pk=project.pk)
    project.refresh_from_db(fields=["served", "decided_by"])
    unfinished = Job.objects.filter(project=project, kind="promote", state__in=Job.UNFINISHED)
    if unfinished.exists():
        raise DataError("another promotion is under way; wait until it has ended")


def _check_server() -> None:
    server = site_server()
    if server is None:
        raise DataError(
            "no model server is connected: set OPENPALM_SERVER_URL and OPENPALM_ADMIN_KEY, or "
            "start the site with `openpalm serve RUN --feedback`"
        )
    if not server.admin_key:
        raise DataError("the model server's key is missing: set OPENPALM_ADMIN_KEY")


# --- in the worker


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "promote".

    The database says which model is served; the file for the server's next start is written with
    it, after the swap. A job that is killed in between is run again. If it then fails, or another
    worker has run it since, the server gets the model of the database back.
    """
    promotion = Promotion.objects.select_related("project", "model", "previous", "by").get(
        pk=job.arguments["promotion"]
    )
    undoing = bool(job.arguments.get("undo"))
    model = promotion.previous if undoing else promotion.model
    assert model is not None
    if promotion.state != (State.DONE if undoing else State.QUEUED):
        return {"model": model.pk}  # the worker ended between the last two writes
    try:
        return _swap(promotion, model, job, progress)
    except JobStopped:
        _wait_for_promotions(progress)
        _restore(promotion.project, model)
        raise


def _swap(
    promotion: Promotion, model: ModelVersion, job: Job, progress: Progress
) -> dict[str, Any]:
    """Requests in flight finish on the old model. The name in the API stays."""
    progress.say(f"loading {model} into the server")
    try:
        server = _server()
        answer = server.replace_model(model.path, server.model_name())
    except OpenPalmError as error:
        progress.confirm()
        line = one_line(error)
        # It may have the model all the same: by an attempt before this one, or a little later.
        if job.lease > 1 or isinstance(error, NoAnswerError):
            line += _restore(promotion.project, model)
        _store_failure(promotion, model, line, job, progress)
        raise WorkError(line) from error
    try:
        with progress.writing():
            _store(promotion, model, job)
            write_served(model)
    except OSError:  # of the file
        _restore(promotion.project, model)
        raise
    return {"model": model.pk, "replaced": answer.get("replaced", "")}


def _server() -> ModelServer:
    server = site_server()
    if server is None:
        raise DataError("no model server is connected: set OPENPALM_SERVER_URL")
    return server


def _restore(project: Project, model: ModelVersion) -> str:
    """Loads what the database says instead of `model`; returns what a message adds about it."""
    project.refresh_from_db(fields=["served"])
    served, path = project.served, promoted_path()
    is_unfinished = path == model.path and served != model
    if served is not None and (path is None or is_unfinished):
        path = served.path
    if not path or path == model.path:
        return ""
    try:
        if is_unfinished and served is not None:
            write_served(served)
        server = _server()
        server.replace_model(path, server.model_name())
    except (OpenPalmError, OSError):
        log.warning("the model server may have %s, not %s, until it starts again", model, path)
        return f"; until the server starts again it may have {model}"
    log.warning("the model server has %s again, not %s", path, model)
    return "; the server has the model before it"


def _wait_for_promotions(progress: Progress) -> None:
    """Until another worker's has ended: what it stores decides what the server has to have."""
    while Job.objects.filter(kind="promote", state=Job.State.RUNNING).exists():
        if progress.ends_within(POLL_S):
            break


def _store_failure(
    promotion: Promotion, model: ModelVersion, line: str, job: Job, progress: Progress
) -> None:
    failed = {} if job.arguments.get("undo") else {"state": State.FAILED}
    with progress.writing():
        Promotion.objects.filter(pk=promotion.pk).update(error=line, **failed)
        audit.record(
            "model.promotion_failed",
            user=job.created_by,
            project=promotion.project,
            target=model,
            error=line,
        )


def _store(promotion: Promotion, model: ModelVersion, job: Job) -> None:
    now, undoing = timezone.now(), bool(job.arguments.get("undo"))
    changed = (
        {"state": State.UNDONE, "undone_at": now}
        if undoing
        else {"state": State.DONE, "done_at": now}
    )
    Promotion.objects.filter(pk=promotion.pk).update(error="", **changed)
    Project.objects.filter(pk=promotion.project_id).update(served=model)
    audit.record(
        "model.promotion_undone" if undoing else "model.promoted",
        user=job.created_by,
        project=promotion.project,
        target=model,
        promotion=promotion.pk,
    )
