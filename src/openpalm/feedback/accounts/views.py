"""Pages of the first sign-up, the account, API tokens and invitations."""

import secrets
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.auth import login
from django.db import connection, transaction
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import public_page, signed_in_page
from openpalm.feedback.accounts.forms import SignUpForm, TokenForm
from openpalm.feedback.accounts.invitations import find_invitation, join
from openpalm.feedback.accounts.setup_link import setup_token
from openpalm.feedback.accounts.tokens import issue
from openpalm.feedback.models import Invitation, Project, User


@require_GET
@public_page
def healthz(request: HttpRequest) -> JsonResponse:
    """Whether the process answers and reaches its database."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return JsonResponse({"status": "ok"})


@require_http_methods(["GET", "POST"])
@public_page
def setup(request: HttpRequest) -> HttpResponse:
    """Signs up the first administrator, who has the link that the command printed."""
    if User.objects.filter(is_superuser=True).exists():
        return redirect("home")
    given = request.POST.get("token") or request.GET.get("token", "")
    if not secrets.compare_digest(given.encode(), setup_token(settings.FEEDBACK_DIR).encode()):
        return render(request, "feedback/accounts/setup_closed.html", status=403)
    form = SignUpForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        user: Any = form.save(commit=False)
        user.is_superuser = user.is_staff = True
        user.save()
        login(request, user)
        audit.record("site.set_up", user=user, target=user)
        return redirect("home" if Project.objects.exists() else "project-new")
    return render(request, "feedback/accounts/setup.html", {"form": form, "token": given})


def projects_of(user: User) -> Any:
    projects = Project.objects.order_by("name")
    return projects if user.is_superuser else projects.filter(memberships__user=user)


@require_GET
@signed_in_page
def account(request: Any) -> HttpResponse:
    """The user's projects and API tokens."""
    return _account(request, TokenForm(projects=projects_of(request.user)))


def _account(request: Any, form: TokenForm, status: int = 200, secret: str = "") -> HttpResponse:
    context = {
        "form": form,
        "secret": secret,
        "tokens": request.user.tokens.filter(revoked_at=None).select_related("project"),
        "memberships": request.user.memberships.select_related("project"),
        "now": timezone.now(),
    }
    return render(request, "feedback/accounts/account.html", context, status=status)


@require_POST
@signed_in_page
def token_new(request: Any) -> HttpResponse:
    """Makes a token and shows it in this answer only: it is neither stored nor in the session."""
    projects = projects_of(request.user)
    form = TokenForm(request.POST, projects=projects)
    if not form.is_valid():
        return _account(request, form, 422)
    given = form.cleaned_data
    days, project = given["days"], given["project"]
    secret = issue(
        request.user,
        given["name"],
        given["scopes"],
        project=project,
        expires_at=None if days is None else timezone.now() + timedelta(days=days),
    )
    audit.record(
        "token.made",
        user=request.user,
        project=project,
        target=given["name"],
        scopes=given["scopes"],
    )
    return _account(request, TokenForm(projects=projects), 201, secret)


@require_POST
@signed_in_page
def token_revoke(request: Any, token_id: int) -> HttpResponse:
    token = request.user.tokens.filter(pk=token_id).first()
    if token is None:
        raise Http404("this token is not yours")
    if token.revoked_at is None:
        token.revoked_at = timezone.now()
        token.save(update_fields=["revoked_at"])
        audit.record("token.revoked", user=request.user, project=token.project, target=token.name)
    messages.success(request, f"The token {token.name} is revoked.")
    return redirect("account")


@require_http_methods(["GET", "POST"])
@public_page
def invitation(request: Any, secret: str) -> HttpResponse:
    """Shows an invitation; its visitor joins with their account, or signs up."""
    found = find_invitation(secret)
    if found is None:
        raise Http404("This invitation is no longer valid. Ask for a new one.")
    if request.user.is_authenticated:
        form = None
        if request.method == "POST":
            return _join(request, found)
    else:
        form = SignUpForm(request.POST or None)
        if request.method == "POST" and form.is_valid():
            return _sign_up(request, found, form)
    context = {"invitation": found, "form": form}
    return render(request, "feedback/accounts/invitation.html", context)


def _sign_up(request: Any, found: Invitation, form: SignUpForm) -> HttpResponse:
    try:
        with transaction.atomic():  # no account without a membership
            user: Any = form.save()
            join(found, user)
    except DataError as error:
        raise Http404(str(error)) from None
    login(request, user)
    return redirect("label", found.project.slug)


def _join(request: Any, found: Invitation) -> HttpResponse:
    try:
        membership = join(found, request.user)
    except DataError as error:
        raise Http404(str(error)) from None
    messages.success(request, f"You are a member of {found.project.name} ({membership.role}).")
    return redirect("label", found.project.slug)
