"""The accounts of the site, and links to set a new password."""

from typing import Any, NoReturn

from django.contrib import messages
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts import password_reset, throttle
from openpalm.feedback.accounts.access import public_page, site_admin_page
from openpalm.feedback.models import User
from openpalm.feedback.paging import name_in, page_of

PEOPLE = "feedback/accounts/people.html"
INVALID = "This link is used up, out of date or incomplete. Ask for a new one."
COUNTED_AS = "(reset link)"
"""the name of failures; parentheses are in no account's name"""


@require_GET
@site_admin_page
def people(request: HttpRequest) -> HttpResponse:
    users = User.objects.all()
    if who := name_in(request):
        users = users.filter(username__icontains=who)
    page = page_of(users, request)
    rows = [(user, password_reset.refusal(user)) for user in page.rows]
    return render(request, PEOPLE, {"page": page, "rows": rows, "who": who})


@require_POST
@site_admin_page
def reset_link(request: Any, user_id: int) -> HttpResponse:
    """Makes a link and shows it in this answer only."""
    user = User.objects.filter(pk=user_id).first()
    if user is None:
        raise Http404("there is no such account")
    try:
        path = password_reset.link_path(user, request.user)
    except DataError as error:
        messages.error(request, f"No link: {error}.")
        return redirect("people")
    context = {"link": request.build_absolute_uri(path), "of": user}
    return render(request, PEOPLE, context, status=201)


@require_http_methods(["GET", "POST"])
@public_page
def reset(request: Any, user_id: int, secret: str) -> HttpResponse:
    """Sets a new password by a link. Wrong links count as failed attempts of their address."""
    address = throttle.address_of(request)
    if wait := throttle.seconds_for_address(address):
        raise Http404(f"Too many failed attempts. Wait {wait} s, then open the link again.")
    user = password_reset.find(user_id, secret)
    if user is None:
        _refuse(address)
    form = password_reset.NewPasswordForm(user)
    if request.method == "POST":
        found = password_reset.set_password(user_id, secret, request.POST)
        if found is None:
            _refuse(address)
        if found.is_valid():
            messages.success(request, "Your new password is set. Sign in with it.")
            return redirect("login")
        form = found
    context = {"form": form, "of": user}
    status = 422 if form.is_bound else 200
    return render(request, "feedback/accounts/reset.html", context, status=status)


def _refuse(address: str) -> NoReturn:
    throttle.begin_attempt(COUNTED_AS, address)
    raise Http404(INVALID)
