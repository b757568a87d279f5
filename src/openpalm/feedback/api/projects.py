"""/api/v1/projects: the projects of the token's user."""

from django.core.exceptions import ValidationError
from django.db import IntegrityError
from django.http import JsonResponse

from openpalm.feedback.api.json_forms import project_json
from openpalm.feedback.api.protocol.endpoints import Call, each, operation
from openpalm.feedback.api.protocol.errors import ApiError
from openpalm.feedback.manage.forms import MAX_AXES
from openpalm.feedback.manage.projects import add_project
from openpalm.feedback.models import Guideline, Membership, Project, Role, Task, User

DECIDERS = (User.Kind.PERSON.value, User.Kind.SIMULATED.value)


@operation("projects:read", Role.ANNOTATOR)
def list_projects(call: Call) -> JsonResponse:
    roles = dict(Membership.objects.filter(user=call.user).values_list("project_id", "role"))
    projects = Project.objects.all()
    if not call.user.is_superuser:
        projects = projects.filter(pk__in=roles)
    if call.token.project_id is not None:
        projects = projects.filter(pk=call.token.project_id)
    owner = Role.OWNER if call.user.is_superuser else None
    return call.page(projects, each(lambda p: project_json(p, owner or roles[p.pk])))


@operation("projects:read", Role.ANNOTATOR)
def get_project(call: Call, slug: str) -> JsonResponse:
    project, role = call.enter(slug)
    call.finish()
    return JsonResponse(project_json(project, role))


@operation("projects:read", Role.ANNOTATOR)
def get_guidelines(call: Call, slug: str) -> JsonResponse:
    """What labelers follow, in Markdown: the newest version, or `version`; null without any."""
    project, _ = call.enter(slug)
    version = call.query.whole("version", 1, 2**31 - 1, None)
    call.finish()
    found = project.guideline if version is None else _version(project, version)
    shown = {"version": found.version, "text": found.text} if found else None
    return JsonResponse({"guidelines": shown})


def _version(project: Project, version: int) -> Guideline:
    found = project.guidelines.filter(version=version).first()
    if found is None:
        raise ApiError(404, "there is no such version of the guidelines", "version")
    return found


@operation("projects:write", Role.OWNER)
def create_project(call: Call) -> JsonResponse:
    """The user becomes its owner."""
    if call.token.project_id is not None:
        raise ApiError(403, "this token is limited to a project, so it cannot create another")
    if not call.user.is_superuser:
        raise ApiError(403, "only administrators of the site create projects")
    body = call.body
    project = Project(
        slug=body.text("slug", most=60),
        name=body.text("name", most=120),
        task=body.choice("task", Task.values, Task.PAIR),
        scale=body.choice("scale", (5, 7), 5),
        axes=body.texts("axes", most=MAX_AXES, length=40, default=[]),
        overlap=body.whole("overlap", 1, 20, 1),
        gold_share=body.number("gold_share", 0, 0.5, 0.0),
        repeat_share=body.number("repeat_share", 0, 0.5, 0.0),
        blind=body.flag("blind", True),
        lease_minutes=body.whole("lease_minutes", 1, 10_000, 30),
        decided_by=body.choice("decided_by", DECIDERS, User.Kind.PERSON),
    )
    guidelines = body.text("guidelines", most=100_000, default="")
    if (project.task == Task.RATING) != bool(project.axes):
        body.fail("axes", "a project of the task rating needs axes, no other has any")
    if len(set(project.axes)) < len(project.axes):
        body.fail("axes", "must differ from each other")
    call.finish()
    _save(call, project, guidelines)
    return JsonResponse(project_json(project, Role.OWNER), status=201)


def _save(call: Call, project: Project, guidelines: str) -> None:
    try:
        project.clean_fields(exclude=["served"])
        add_project(project, call.user, guidelines, by="api")
    except ValidationError as error:
        name, messages = next(iter(error.message_dict.items()))
        call.body.fail(name, messages[0])
    except IntegrityError:
        raise ApiError(409, f"there is a project {project.slug}", "slug") from None
