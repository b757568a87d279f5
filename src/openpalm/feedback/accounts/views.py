"""Set-up of the first administrator, sign in, the list of projects."""

import secrets
from typing import Any

from django.conf import settings
from django.contrib.auth import login
from django.contrib.auth.forms import UserCreationForm
from django.db import connection
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.access import public_page, signed_in_page
from openpalm.feedback.accounts.setup_link import setup_token
from openpalm.feedback.models import Project, User


@require_GET
@public_page
def healthz(request: HttpRequest) -> JsonResponse:
    """Whether the process answers and reaches its database."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return JsonResponse({"status": "ok"})


class SignUpForm(UserCreationForm):
    class Meta(UserCreationForm.Meta):  # pyright: ignore
        model = User
        fields = ("username",)


@require_http_methods(["GET", "POST"])
@public_page
def setup(request: HttpRequest) -> HttpResponse:
    """Signs up the first administrator, who has the link that the command printed."""
    if User.objects.filter(is_superuser=True).exists():
        return redirect("home")
    given = request.POST.get("token") or request.GET.get("token", "")
    if not secrets.compare_digest(given.encode(), setup_token(settings.FEEDBACK_DIR).encode()):
        return render(request, "feedback/setup_closed.html", status=403)
    form = SignUpForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        user: Any = form.save(commit=False)
        user.is_superuser = user.is_staff = True
        user.save()
        login(request, user)
        audit.record("site.set_up", user=user, target=user)
        return redirect("home")
    return render(request, "feedback/setup.html", {"form": form, "token": given})


@require_GET
@signed_in_page
def home(request: HttpRequest) -> HttpResponse:
    projects = Project.objects.order_by("-id")
    if not request.user.is_superuser:
        projects = projects.filter(memberships__user=request.user)
    return render(request, "feedback/home.html", {"projects": projects})


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    reason = str(exception) if isinstance(exception, Http404) else ""
    return render(request, "feedback/error.html", {"status": 404, "reason": reason}, status=404)
