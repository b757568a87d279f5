"""Rights: every view says who may open it, and a test opens every URL in every role.

    annotator   judge items, read the guidelines, see their own judgements
    reviewer    also see all items, judgements, agreement and the board
    admin       also settings, members, import and export, training, promotion
    owner       also name other owners, close the project and open it again

A superuser has the rights of an owner in every project. Users without a role get a 404.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from django.contrib.auth.decorators import login_required
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse

from openpalm.feedback.models import Membership, Project, Role, User

View = Callable[..., HttpResponse]
RANKS: dict[str, int] = {role: rank for rank, role in enumerate(Role.values)}
PUBLIC, SIGNED_IN, SITE_ADMIN = "public", "signed in", "site admin"


class ProjectRequest(HttpRequest):
    """What a project page gets: a request with its project and the role of its user."""

    project: Project
    role: str
    user: User  # pyright: ignore[reportIncompatibleVariableOverride]


def role_in(project: Project, user: User) -> str | None:
    """The user's role in the project; None without a membership."""
    if user.is_superuser:
        return Role.OWNER
    membership = Membership.objects.filter(project=project, user=user).first()
    return membership.role if membership and user.is_active else None


def has_rank(role: str | None, least: str) -> bool:
    return role is not None and RANKS[role] >= RANKS[least]


def find_project(user: User, slug: str) -> tuple[Project, str]:
    """The project and the user's role in it. Raises Http404, also for projects of others."""
    project = Project.objects.filter(slug=slug).first()
    role = role_in(project, user) if project else None
    if project is None or role is None:
        raise Http404("there is no such project, or you are not a member of it")
    return project, role


def project_page(least: str = Role.ANNOTATOR) -> Callable[[View], View]:
    """A page under /p/<slug>/ for members whose role is `least` or above."""

    def decorate(view: View) -> View:
        @wraps(view)
        def checked(request: Any, slug: str, *args: Any, **names: Any) -> HttpResponse:
            request.project, request.role = find_project(request.user, slug)
            if not has_rank(request.role, least):
                raise PermissionDenied(f"this page is for the role {least} or above")
            return view(request, *args, **names)

        return _marked(login_required(checked), least)

    return decorate


def public_page(view: View) -> View:
    return _marked(view, PUBLIC)


def signed_in_page(view: View) -> View:
    return _marked(login_required(view), SIGNED_IN)


def site_admin_page(view: View) -> View:
    @wraps(view)
    def checked(request: HttpRequest, *args: Any, **names: Any) -> HttpResponse:
        if not request.user.is_superuser:
            raise PermissionDenied("this page is for the administrators of the site")
        return view(request, *args, **names)

    return _marked(login_required(checked), SITE_ADMIN)


def _marked(view: Any, access: str) -> View:
    view.access = access
    return view
