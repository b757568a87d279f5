"""One-time links with which a person sets a new password, without e-mail.

An administrator of the site makes a link on the page of accounts and hands it over. It is signed
with the secret key and stored nowhere. The signature covers the password's hash and the last
sign-in, so that the link ends with its first use, and with a sign-in by the old password.

Nobody makes a link for an administrator on the pages: this would give their account away. Who has
the server's command line does, by `openpalm feedback manage reset_link`.
"""

from typing import Any

from django.contrib.auth.forms import SetPasswordForm
from django.contrib.auth.tokens import PasswordResetTokenGenerator
from django.db import transaction

from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.accounts.forms import PlainLabels, explain_passwords
from openpalm.feedback.models import User


class ResetSecrets(PasswordResetTokenGenerator):
    """Django's, ended also by a change of the rights: the link was for the account as it was."""

    key_salt = "openpalm.feedback.accounts.password_reset"

    def _make_hash_value(self, user: User, timestamp: int) -> str:  # pyright: ignore
        rights = f"{user.is_superuser}{user.is_staff}{user.is_active}"
        return f"{super()._make_hash_value(user, timestamp)}{rights}"


secrets = ResetSecrets()


class NewPasswordForm(PlainLabels, SetPasswordForm):
    """The new password twice, by the rules of sign-up."""

    def __init__(self, *args: Any, **names: Any) -> None:
        super().__init__(*args, **names)
        explain_passwords(self, "new_password1", "new_password2")


def refusal(user: User) -> str:
    """Why the pages make no link for this account; empty if they do."""
    if user.is_superuser:
        return "is an administrator of the site; a link is made on the server's command line"
    return closed(user)


def closed(user: User) -> str:
    """Why no link of this account is of use; empty if one is."""
    if user.kind != User.Kind.PERSON:
        return "is a program, which signs in by an API token"
    return "" if user.is_active else "is closed"


def link_path(user: User, by: User | None) -> str:
    """The path of a new link. `by` is the administrator; None on the command line.

    Raises DataError.
    """
    why = refusal(user) if by is not None else closed(user)
    if why:
        raise DataError(f"the account {user.username} {why}")
    where = "page" if by is not None else "command line"
    audit.record("account.reset_link_made", user=by, target=user.username, made_on=where)
    return f"/reset/{user.pk}/{secrets.make_token(user)}"


def find(user_id: int, secret: str) -> User | None:
    """The account that this link is for; None if the link is invalid or expired."""
    user = User.objects.filter(pk=user_id).first()
    is_right = user is not None and not closed(user) and secrets.check_token(user, secret)
    return user if is_right else None


@transaction.atomic
def set_password(user_id: int, secret: str, given: object) -> NewPasswordForm | None:
    """The form, saved if it is valid; None if the link was used in between.

    The new hash of the password ends all sessions of the account, and this and other links.
    """
    User.objects.select_for_update().filter(pk=user_id).first()
    user = find(user_id, secret)
    if user is None:
        return None
    form = NewPasswordForm(user, given)
    if form.is_valid():
        form.save()
        audit.record("account.password_reset", user=user, target=user.username)
    return form
