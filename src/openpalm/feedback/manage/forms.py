"""Forms of projects, guidelines and invitations."""

from typing import Any

from django import forms
from django.core.exceptions import ValidationError

from openpalm.feedback.accounts.forms import PlainLabels
from openpalm.feedback.models import Project, Task

MAX_AXES = 12
_FROZEN = ("task", "scale", "axes")
"""settings that give judgements their meaning"""


class ShareField(forms.IntegerField):
    """A share, written as whole percent."""

    def __init__(self, most: int = 50, **names: Any) -> None:
        super().__init__(min_value=0, max_value=most, initial=0, **names)

    def prepare_value(self, value: Any) -> Any:
        return round(value * 100) if isinstance(value, float) else value

    def clean(self, value: Any) -> Any:
        percent = super().clean(value)
        return None if percent is None else percent / 100


class AxesField(forms.CharField):
    """Names of axes, one a line."""

    widget = forms.Textarea

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(value) if isinstance(value, list) else value

    def clean(self, value: Any) -> Any:
        lines = [line.strip() for line in (super().clean(value) or "").splitlines()]
        axes = list(dict.fromkeys(line for line in lines if line))
        if len(axes) > MAX_AXES:
            raise ValidationError(f"{len(axes)} axes; at most {MAX_AXES}")
        if too_long := [axis for axis in axes if len(axis) > 40]:
            raise ValidationError(f"{too_long[0][:60]}: an axis has at most 40 characters")
        return axes


class SettingsForm(PlainLabels, forms.ModelForm):
    """A project's settings; what gives judgements their meaning is frozen once there are any."""

    axes = AxesField(
        required=False, help_text="For ratings: one axis a line, such as helpful, true, harmless."
    )
    gold_share = ShareField(
        label="Gold items (%)",
        help_text="Share of items with a known answer, to see how well each labeler judges.",
    )
    repeat_share = ShareField(
        label="Repeated items (%)",
        help_text="Share of items shown a second time, to measure agreement with oneself.",
    )

    class Meta:
        model = Project
        fields = (
            *("name", "task", "scale", "axes", "overlap", "gold_share", "repeat_share"),
            *("blind", "lease_minutes", "decided_by"),
        )
        labels = {
            "overlap": "Judgements for each item",
            "lease_minutes": "Minutes until an abandoned item goes to another person",
            "blind": "Blind: labelers never see which model wrote an answer",
            "scale": "Steps of a comparison",
            "decided_by": "Comparisons of models count the judgements of",
        }
        help_texts = {
            "overlap": "Each new item gets exactly this many. Two or more show agreement.",
            "blind": "If not, the models are named after each judgement, never before it.",
            "decided_by": "For comparisons that start from now on. Simulated labelers are marked "
            "in the comparison and in the promotion that follows.",
        }

    def __init__(self, *args: Any, frozen: bool = False, **names: Any) -> None:
        super().__init__(*args, **names)
        if "decided_by" in self.fields:
            self.fields["decided_by"].required = False  # not sent: stays as it is
        if frozen:
            for name in _FROZEN:
                if name in self.fields:
                    self.fields[name].disabled = True
                    self.fields[name].help_text = "Fixed, because there are judgements."

    def clean(self) -> dict[str, Any]:
        given = super().clean() or {}
        if "decided_by" in self.fields and not given.get("decided_by"):
            given["decided_by"] = self.instance.decided_by
        if given.get("task") == Task.RATING and not given.get("axes") and "axes" not in self.errors:
            self.add_error("axes", "Name at least one axis, since people rate on axes.")
        return given


class NewProjectForm(SettingsForm):
    guidelines = forms.CharField(
        required=False,
        max_length=100_000,
        widget=forms.Textarea,
        help_text="What is a good answer? In Markdown; labelers open it with the key G.",
    )

    class Meta(SettingsForm.Meta):
        # Not yet decided_by, which is for comparisons of models.
        fields = ("name", "slug", *SettingsForm.Meta.fields[1:-1])
        labels = SettingsForm.Meta.labels | {"slug": "Name in URLs"}

    def clean_slug(self) -> str:
        slug = self.cleaned_data["slug"]
        if Project.objects.filter(slug=slug).exists():
            raise ValidationError("There is a project with this name in URLs.")
        return slug


class GuidelineForm(PlainLabels, forms.Form):
    text = forms.CharField(
        label="Guidelines in Markdown", max_length=100_000, widget=forms.Textarea
    )


class InvitationForm(PlainLabels, forms.Form):
    role = forms.ChoiceField()
    days = forms.TypedChoiceField(
        label="Valid for",
        coerce=int,
        choices=[(1, "1 day"), (7, "7 days"), (30, "30 days")],
        initial=7,
    )
    uses = forms.IntegerField(label="People who may use it", min_value=1, max_value=1000, initial=1)

    def __init__(self, *args: Any, roles: list[str], **names: Any) -> None:
        super().__init__(*args, **names)
        field: Any = self.fields["role"]
        field.choices = [(role, role) for role in roles]
