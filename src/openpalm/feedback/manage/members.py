"""Pages of members: roles, removal, leaving, invitations."""

from typing import Any

from django.contrib import messages
from django.db import transaction
from django.http import Http404, HttpResponse
from django.shortcuts import redirect
from django.utils import timezone
from django.views.decorators.http import require_GET, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import ProjectRequest, has_rank, project_page
from openpalm.feedback.accounts.invitations import grantable_roles, invite
from openpalm.feedback.manage.forms import InvitationForm
from openpalm.feedback.manage.pages import find, page
from openpalm.feedback.models import Invitation, Membership, Project, Role


@require_GET
@project_page(Role.ADMIN)
def members(request: ProjectRequest) -> HttpResponse:
    return _members(request, InvitationForm(roles=grantable_roles(request.role)))


def _members(
    request: ProjectRequest, form: InvitationForm, status: int = 200, link: str = ""
) -> HttpResponse:
    invitations = Invitation.objects.filter(
        project=request.project, revoked_at=None, uses_left__gt=0, expires_at__gt=timezone.now()
    )
    return page(
        request,
        "members",
        status=status,
        form=form,
        link=link,
        members=request.project.memberships.select_related("user").order_by("user__username"),
        roles=grantable_roles(request.role),
        invitations=invitations.select_related("created_by").order_by("-id"),
    )


@require_POST
@project_page(Role.ADMIN)
def member_role(request: ProjectRequest, member_id: int) -> HttpResponse:
    """Changes a member's role, at most to the user's own."""
    try:
        _change(request, member_id, request.POST.get("role", ""))
    except DataError as error:
        messages.error(request, f"Not changed: {error}.")
    return redirect("members", request.project.slug)


@require_POST
@project_page(Role.ADMIN)
def member_remove(request: ProjectRequest, member_id: int) -> HttpResponse:
    try:
        _change(request, member_id, None)
    except DataError as error:
        messages.error(request, f"Not removed: {error}.")
    return redirect("members", request.project.slug)


@require_POST
@project_page()
def leave(request: ProjectRequest) -> HttpResponse:
    """Ends the user's own membership; their judgements stay."""
    mine = Membership.objects.filter(project=request.project, user=request.user).first()
    if mine is None:
        raise Http404("you are not a member of this project")
    try:
        _change(request, mine.pk, None, is_own=True)
    except DataError as error:
        messages.error(request, f"You cannot leave: {error}.")
        return redirect("account")
    messages.success(request, f"You have left {request.project.name}.")
    return redirect("account")


@transaction.atomic
def _change(
    request: ProjectRequest, member_id: int, role: str | None, *, is_own: bool = False
) -> None:
    """Sets a member's role, or ends the membership if it is None. Raises DataError."""
    # One change at a time: two owners who remove each other must not leave a project without one.
    project = Project.objects.select_for_update().get(pk=request.project.pk)
    member = find(project.memberships.select_related("user"), member_id, request)
    if role is not None and role not in grantable_roles(request.role):
        raise DataError(f"the role {role[:20]!r} is not one that you may give")
    if not is_own and not has_rank(request.role, member.role):
        raise DataError(f"only an owner changes the {member.role} {member.user.username}")
    if member.role == Role.OWNER and role != Role.OWNER:
        others = project.memberships.filter(role=Role.OWNER).exclude(pk=member.pk)
        if not others.exists():
            raise DataError(f"{member.user.username} is the last owner; name another one first")
    data: dict[str, Any] = {"before": member.role}
    if role is None:
        _revoke_invitations(project, member)
        member.delete()
    else:
        data["role"] = member.role = role
        member.save(update_fields=["role"])
    action = "member.removed" if role is None else "member.role_changed"
    audit.record(action, user=request.user, project=project, target=member.user, **data)


def _revoke_invitations(project: Project, member: Membership) -> None:
    """A former member's links must not bring them, or others, back in."""
    made = Invitation.objects.filter(project=project, created_by=member.user, revoked_at=None)
    made.update(revoked_at=timezone.now())


@require_POST
@project_page(Role.ADMIN)
def invitation_new(request: ProjectRequest) -> HttpResponse:
    """Makes a link and shows it once; the database stores only its hash."""
    roles = grantable_roles(request.role)
    form = InvitationForm(request.POST, roles=roles)
    if not form.is_valid():
        return _members(request, form, 422)
    if not request.project.open:
        form.add_error(None, "The project is closed; open it again to invite people.")
        return _members(request, form, 422)
    given = form.cleaned_data
    _, secret = invite(
        request.project, request.user, given["role"], days=given["days"], uses=given["uses"]
    )
    link = request.build_absolute_uri(f"/invite/{secret}")
    return _members(request, InvitationForm(roles=roles), 201, link)


@require_POST
@project_page(Role.ADMIN)
def invitation_revoke(request: ProjectRequest, invitation_id: int) -> HttpResponse:
    found = find(Invitation.objects.all(), invitation_id, request)
    if found.revoked_at is None:
        found.revoked_at = timezone.now()
        found.save(update_fields=["revoked_at"])
        audit.record_for(request, "invitation.revoked", target=found.pk)
    messages.success(request, "The invitation is revoked.")
    return redirect("members", request.project.slug)
