"""Forms of the loop: the next batch, a training, a model, a comparison."""

from collections.abc import Mapping
from typing import Any

from django import forms
from django.db.models import Count, Exists, OuterRef, QuerySet, Subquery
from django.db.models.functions import Coalesce

from openpalm.feedback.accounts.forms import PlainLabels
from openpalm.feedback.judgements.words import AUTHORS
from openpalm.feedback.models import ModelVersion, Project, Task
from openpalm.feedback.statistics.promotion import MINIMUM
from openpalm.feedback.training.answers import DEFAULT_SAMPLING
from openpalm.feedback.training.commands import DEFAULTS, MAX_MEMBERS
from openpalm.feedback.training.comparisons import MOST_PAIRS
from openpalm.feedback.training.registry import POLICY, REWARD
from openpalm.feedback.training.selection import BATCH_SIZE, MOST_IN_BATCH
from openpalm.feedback.training.snapshots import Filter, default_filter

VERBS = {
    "reward": "Reward model",
    "dpo": "DPO",
    "ppo": "PPO",
    "sft": "SFT",
}
ABOUT = {
    "reward": "Learns from comparisons, rankings, ratings and edits which answer is better.",
    "dpo": "Trains a model that answers directly on which answer was preferred.",
    "ppo": "Lets a model answer the training prompts and rewards it with a reward model.",
    "sft": "Trains a model on answers that people edited or wrote.",
}
OF_VERB = {
    "reward": ("members", "axis", "hold_back"),
    "dpo": ("loss", "beta"),
    "ppo": ("kl_coef",),
    "sft": (),
}
"""settings that only this verb has"""
SETTINGS = {"lr": "optim.lr", "rank": "lora.rank"}
"""names of fields that are no names of options"""


class BatchForm(PlainLabels, forms.Form):
    size = forms.IntegerField(
        label="Pairs", min_value=1, max_value=MOST_IN_BATCH, initial=BATCH_SIZE
    )


class RewardField(forms.ModelChoiceField):
    """The reward models; an ensemble is listed by its first member."""

    def label_from_instance(self, obj: Any) -> str:
        return f"{obj.name} (ensemble of {obj.size})" if obj.size > 1 else obj.name


def rewards(known: "QuerySet[ModelVersion]") -> "QuerySet[ModelVersion]":
    """One reward model of each training, with the `size` of its ensemble."""
    of_run = ModelVersion.objects.filter(run=OuterRef("run"), kind=REWARD)
    size = of_run.order_by().values("run").annotate(n=Count("pk")).values("n")
    found = known.filter(kind=REWARD).annotate(size=Coalesce(Subquery(size), 1))
    return found.exclude(Exists(of_run.filter(pk__lt=OuterRef("pk"))))


class TrainForm(PlainLabels, forms.Form):
    """One training. An empty setting leaves the command's default."""

    parent = forms.ModelChoiceField(ModelVersion.objects.none(), label="Start from")
    reward = RewardField(ModelVersion.objects.none(), label="Reward model")
    authors = forms.MultipleChoiceField(
        label="Judgements by",
        widget=forms.CheckboxSelectMultiple,
        help_text="Those in force now are frozen. Gold items and held-out prompts are never used.",
    )
    comparisons = forms.BooleanField(
        label="Also judgements of comparisons",
        required=False,
        help_text="Only on prompts that are no longer held out.",
    )
    hold_back = forms.BooleanField(
        label="Hold back the random arm's prompts",
        required=False,
        help_text="The random arm is 30 % of the prompts, always the same. The model is measured "
        "on their judgements and not trained on them.",
    )
    axis = forms.ChoiceField(
        label="Axis to learn",
        required=False,
        help_text="One axis: its ratings are predicted. All: which answer has the higher mean.",
    )
    loss = forms.ChoiceField(
        choices=[("dpo", "DPO"), ("ipo", "IPO"), ("kto", "KTO: from thumbs, and from both bad")],
        initial="dpo",
    )
    members = forms.IntegerField(
        min_value=1,
        max_value=MAX_MEMBERS,
        initial=3,
        help_text="So many models are trained, each with another seed. Where two or more disagree, "
        "a judgement teaches most: the next batch asks there.",
    )
    steps = forms.IntegerField(min_value=1, max_value=1_000_000, required=False)
    lr = forms.FloatField(
        label="Learning rate",
        required=False,
        help_text="Default: the command's own, which depends on the model.",
    )
    beta = forms.FloatField(
        min_value=0.0001,
        max_value=999,
        required=False,
        help_text="Default: 0.1. Larger stays closer to the parent.",
    )
    kl_coef = forms.FloatField(
        label="KL penalty coefficient",
        min_value=0,
        max_value=999,
        required=False,
        help_text="Default: 0.05 per nat. Larger stays closer to the parent.",
    )
    rank = forms.IntegerField(
        label="LoRA rank",
        min_value=1,
        max_value=1024,
        required=False,
        help_text="Default: none; all weights are trained.",
    )
    seed = forms.IntegerField(min_value=0, max_value=2**31 - 1, initial=0)
    name = forms.CharField(
        max_length=80, required=False, help_text="Default: the training and its number."
    )

    def __init__(
        self, *args: Any, project: Project, verb: str, counted: Mapping[str, int], **names: Any
    ) -> None:
        super().__init__(*args, **names)
        self.verb = verb
        known = ModelVersion.objects.filter(project=project).exclude(path="").order_by("-id")
        parent: Any = self.fields["parent"]
        parent.queryset = known if verb == "reward" else known.filter(kind=POLICY)
        parent.initial = project.served_id
        reward: Any = self.fields["reward"]
        reward.queryset = rewards(known)
        reward.initial = reward.queryset.first()
        authors: Any = self.fields["authors"]
        authors.choices = [(kind, _with_count(kind, counted)) for kind in AUTHORS]
        chosen = default_filter(project, verb)
        authors.initial = list(chosen.author_kinds)
        self.fields["hold_back"].initial = chosen.hold_back
        axis: Any = self.fields["axis"]
        axis.choices = [("", "all axes"), *((name, name) for name in project.axes)]
        if project.task == Task.THUMBS:
            self.fields["loss"].initial = "kto"
        (length, number), *_ = DEFAULTS[verb].items()
        self.fields["steps"].help_text = f"Default: {number} {length}."
        self._leave_out(has_axes=project.task == Task.RATING)

    def _leave_out(self, *, has_axes: bool) -> None:
        """Removes the fields that this verb does not use."""
        others = {name for names in OF_VERB.values() for name in names} - {*OF_VERB[self.verb]}
        if self.verb == "ppo":
            others |= {"authors", "comparisons"}
        else:
            others.add("reward")
        if not has_axes:
            others.add("axis")
        for name in others:
            del self.fields[name]

    def settings(self) -> dict[str, Any]:
        """What runs.start takes as settings."""
        own = ("steps", "lr", "rank", "seed", "name", *OF_VERB[self.verb])
        given = {name: self.cleaned_data.get(name) for name in own if name != "hold_back"}
        if given.get("axis"):
            given["loss"] = "regression"  # the pairwise loss has no axes
        return {SETTINGS.get(k, k): v for k, v in given.items() if v not in (None, "")}

    def chosen(self) -> Filter | None:
        """Which judgements are frozen; None for ppo, which has prompts only."""
        if self.verb == "ppo":
            return None
        return Filter(
            tuple(self.cleaned_data["authors"]),
            comparisons=self.cleaned_data["comparisons"],
            hold_back=self.cleaned_data.get("hold_back", False),
        )


def _with_count(kind: str, counted: Mapping[str, int]) -> str:
    count = counted.get(kind)
    return AUTHORS[kind] if count is None else f"{AUTHORS[kind]} ({count:,})"


class RegisterForm(PlainLabels, forms.Form):
    """A checkpoint on the server's disk."""

    path = forms.CharField(
        max_length=500, help_text="A run or a checkpoint directory on the server."
    )
    name = forms.CharField(max_length=80)
    kind = forms.ChoiceField(
        choices=[(POLICY, "a model that answers"), (REWARD, "a reward model")],
        widget=forms.RadioSelect,
        initial=POLICY,
    )


class CompareForm(PlainLabels, forms.Form):
    size = forms.IntegerField(
        label="Pairs", min_value=MINIMUM, max_value=MOST_PAIRS, initial=MINIMUM
    )
    temperature = forms.FloatField(
        min_value=0, max_value=2, initial=DEFAULT_SAMPLING["temperature"]
    )
    max_tokens = forms.IntegerField(
        label="Most tokens of an answer",
        min_value=1,
        max_value=4096,
        initial=DEFAULT_SAMPLING["max_tokens"],
    )


class ExtendForm(PlainLabels, forms.Form):
    further = forms.IntegerField(label="Further pairs", min_value=1, max_value=MOST_PAIRS)
