"""Invitations by link. Only a hash of the link's secret is stored."""

import secrets
from datetime import timedelta

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import RANKS, has_rank, role_in
from openpalm.feedback.accounts.tokens import digest_of
from openpalm.feedback.models import Invitation, Membership, Project, Role, User


def grantable_roles(role: str) -> list[str]:
    """The roles that a member of this role may give: up to their own."""
    return [given for given in Role.values if RANKS[given] <= RANKS[role]]


def invite(
    project: Project, by: User, role: str, *, days: int, uses: int
) -> tuple[Invitation, str]:
    """Returns the row and the secret of its link."""
    secret = secrets.token_urlsafe(32)
    invitation = Invitation.objects.create(
        project=project,
        role=role,
        digest=digest_of(secret),
        created_by=by,
        expires_at=timezone.now() + timedelta(days=days),
        uses_left=uses,
    )
    audit.record(
        "invitation.made", user=by, project=project, target=invitation.pk, role=role, uses=uses
    )
    return invitation, secret


def find_invitation(secret: str) -> Invitation | None:
    """The invitation in force with this secret, if its author could still give its role."""
    found = (
        Invitation.objects.filter(
            digest=digest_of(secret),
            revoked_at=None,
            expires_at__gt=timezone.now(),
            uses_left__gt=0,
            project__open=True,
        )
        .select_related("project", "created_by")
        .first()
    )
    return found if found and _may_give(found) else None


def _may_give(invitation: Invitation) -> bool:
    author = invitation.created_by
    role = role_in(invitation.project, author) if author.is_active else None
    return has_rank(role, invitation.role) and has_rank(role, Role.ADMIN)


@transaction.atomic
def join(invitation: Invitation, user: User) -> Membership:
    """Makes the user a member; a member keeps the role that they have and takes no use.

    Raises DataError if another visitor has taken the last use.
    """
    project = Project.objects.select_for_update().get(pk=invitation.project_id)
    if existing := Membership.objects.filter(project=project, user=user).first():
        return existing
    left = Invitation.objects.filter(pk=invitation.pk, uses_left__gt=0, revoked_at=None)
    if not _may_give(invitation) or not left.update(uses_left=F("uses_left") - 1):
        raise DataError("this invitation has been used up; ask for a new one")
    audit.record("member.joined", user=user, project=project, target=user, role=invitation.role)
    return Membership.objects.create(project=project, user=user, role=invitation.role)
