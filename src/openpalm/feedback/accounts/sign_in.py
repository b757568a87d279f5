"""Sign-in and password change, throttled."""

from typing import Any

from django.contrib.auth import views as auth
from django.contrib.auth.forms import AuthenticationForm, PasswordChangeForm
from django.contrib.messages.views import SuccessMessageMixin
from django.core.exceptions import ValidationError
from django.urls import reverse_lazy

from openpalm.feedback.accounts import audit, throttle
from openpalm.feedback.accounts.forms import PlainLabels, explain_passwords


class LoginForm(PlainLabels, AuthenticationForm):
    """Django's form, as slow for unknown names as for known ones, with a wait after failures."""

    error_messages = AuthenticationForm.error_messages | {
        "invalid_login": "This name and password do not match an account.",
        "inactive": "This name and password do not match an account.",
    }

    def clean(self) -> dict[str, Any]:
        name = self.cleaned_data.get("username")
        if not name or not self.cleaned_data.get("password"):
            return super().clean()
        assert self.request is not None
        address = throttle.address_of(self.request)
        _refuse_early(name, address)
        attempt = throttle.begin_attempt(name, address)
        cleaned = super().clean()
        throttle.succeeded(attempt)
        return cleaned


def _refuse_early(name: str, address: str) -> None:
    if wait := throttle.seconds_to_wait(name, address):
        unit = "second" if wait == 1 else "seconds"
        raise ValidationError(
            f"Too many failed attempts. Wait {wait} {unit}, then try again.", code="throttled"
        )


class LoginView(auth.LoginView):
    template_name = "feedback/accounts/login.html"
    authentication_form = LoginForm


class PasswordForm(PlainLabels, PasswordChangeForm):
    """Guesses of the old password count as failed attempts to sign in."""

    address = ""

    def __init__(self, *args: Any, **names: Any) -> None:
        super().__init__(*args, **names)
        explain_passwords(self, "new_password1", "new_password2")

    def clean_old_password(self) -> str:
        name = self.user.get_username()
        _refuse_early(name, self.address)
        attempt = throttle.begin_attempt(name, self.address)
        old = super().clean_old_password()
        throttle.succeeded(attempt)
        return old


class PasswordView(SuccessMessageMixin, auth.PasswordChangeView):
    """Changing the password signs all other browsers out."""

    template_name = "feedback/accounts/password.html"
    form_class = PasswordForm
    success_url = reverse_lazy("account")
    success_message = "Your password is changed. Other browsers are signed out."

    def get_form(self, form_class: Any = None) -> Any:
        form: Any = super().get_form(form_class)
        form.address = throttle.address_of(self.request)
        return form

    def form_valid(self, form: Any) -> Any:
        audit.record("account.password_changed", user=form.user, target=form.user)
        return super().form_valid(form)
