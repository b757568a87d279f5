"""Forms of accounts: sign up, API tokens."""

from typing import Any

from django import forms
from django.contrib.auth.forms import UserCreationForm

from openpalm.feedback.models import ApiToken, Project, User


class PlainLabels:
    """Labels without a colon."""

    def __init__(self, *args: Any, **names: Any) -> None:
        super().__init__(*args, **({"label_suffix": ""} | names))


def explain_passwords(form: forms.BaseForm, first: str, again: str) -> None:
    """The rules in one line, in place of Django's four."""
    rules = "At least 8 characters, not a common password, not only digits."
    form.fields[first].help_text = rules
    form.fields[again].help_text = ""
    form.fields[again].label = "Password again"


class SignUpForm(PlainLabels, UserCreationForm):
    class Meta(UserCreationForm.Meta):  # pyright: ignore
        model = User
        fields = ("username",)

    def __init__(self, *args: Any, **names: Any) -> None:
        super().__init__(*args, **names)
        self.fields["username"].help_text = "Letters, digits and @ . + - _ only."
        explain_passwords(self, "password1", "password2")

    def validate_password_for_user(self, user: User, password_field_name: str = "password1"):
        """Shows what is wrong where the password was chosen, not where it was repeated."""
        super().validate_password_for_user(user, password_field_name)  # pyright: ignore


class TokenForm(PlainLabels, forms.Form):
    """What a new API token may do, where, and until when."""

    name = forms.CharField(max_length=100, help_text="What will use it, e.g. nightly export.")
    scopes = forms.MultipleChoiceField(
        choices=[(scope, scope) for scope in ApiToken.SCOPES],
        widget=forms.CheckboxSelectMultiple,
        help_text="A token never has more rights than you have.",
    )
    project = forms.ModelChoiceField(
        Project.objects.none(), required=False, empty_label="All my projects"
    )
    days = forms.TypedChoiceField(
        label="Valid for",
        coerce=lambda text: int(text) or None,
        choices=[(30, "30 days"), (90, "90 days"), (365, "1 year"), (0, "no limit")],
        initial=90,
        empty_value=None,
    )

    def __init__(self, *args: Any, projects: Any, **names: Any) -> None:
        super().__init__(*args, **names)
        field: Any = self.fields["project"]
        field.queryset = projects
