"""The five stations of the circle: judge, reward model, train, compare, serve.

Each has its state now and one next action. The first station that waits for a person is marked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from django.db.models import Case, When
from django.urls import reverse

from openpalm.feedback.judgements.words import AUTHORS
from openpalm.feedback.loop.figures import Figures, estimate, rows
from openpalm.feedback.loop.plots import in_words
from openpalm.feedback.models import Comparison, Job, ModelVersion, Project, TrainRun, User
from openpalm.feedback.quality import names


@dataclass
class Station:
    name: str
    state: str
    badge: str = ""
    """good, warn, bad or accent"""
    action: str = ""
    url: str = ""
    least: str = "admin"
    """who may do the action: annotator or admin"""
    is_now: bool = False


@dataclass(frozen=True)
class Newest:
    """The rows that decide the state of each station."""

    reward_model: ModelVersion | None
    reward_run: TrainRun | None
    policy: ModelVersion | None
    policy_run: TrainRun | None
    comparison: Comparison | None
    is_scoring: bool = False
    """whether scores of a model or the figures from them are on their way"""


def newest(project: Project) -> Newest:
    models = ModelVersion.objects.filter(project=project).select_related("run").order_by("-id")
    # An unfinished run comes before newer ones that have ended.
    unfinished = Case(When(state__in=TrainRun.UNFINISHED, then=1), default=0)
    runs = TrainRun.objects.filter(project=project).defer("curve")
    runs = runs.order_by(unfinished.desc(), "-id")
    compared = Comparison.objects.filter(project=project)
    return Newest(
        models.filter(kind=ModelVersion.Kind.REWARD).first(),
        runs.filter(verb="reward").first(),
        models.filter(kind=ModelVersion.Kind.POLICY, run__isnull=False).first(),
        runs.exclude(verb="reward").first(),
        compared.select_related("challenger", "served").order_by("-id").first(),
        Job.objects.filter(
            project=project,
            kind__in=("score", "statistics"),
            state__in=(Job.State.QUEUED, Job.State.RUNNING),
        ).exists(),
    )


def stations(
    project: Project, items: Mapping[str, int], figures: Figures, known: Newest
) -> list[Station]:
    found = [
        _judge(project, items),
        _reward(project, figures, known),
        _train(project, known),
        _compare(project, known),
        _serve(project, known),
    ]
    waiting = [station for station in found if station.badge in ("warn", "bad")]
    if waiting:
        waiting[0].is_now = True
    return found


def _judge(project: Project, items: Mapping[str, int]) -> Station:
    if not items["all"]:
        to_generate = reverse("generate", args=[project.slug])
        return Station("Judge", "nothing to judge yet", "warn", "Generate answers", to_generate)
    state = f"{items['complete']} of {items['all']} items judged"
    if not items["open"]:
        return Station("Judge", state, "good", "Choose the next batch", "#next-batch")
    to_label = reverse("label", args=[project.slug])
    return Station(
        "Judge", f"{state}, {items['open']} open", "accent", "Judge", to_label, "annotator"
    )


def _reward(project: Project, figures: Figures, known: Newest) -> Station:
    name, to_train = "Reward model", f"{reverse('train', args=[project.slug])}?verb=reward"
    if known.reward_run is not None and known.reward_run.state in TrainRun.UNFINISHED:
        return _running(name, project, known.reward_run)
    model = known.reward_model
    if model is None:
        return Station(name, "none yet", "warn", "Train a reward model", to_train)
    for kind in (User.Kind.PERSON, User.Kind.SIMULATED):
        for row in rows(figures.of(names.REWARD_AGREEMENT, kind).get("models")):
            accuracy = estimate(row.get("accuracy"))
            if row.get("model") == model.pk and accuracy:
                state = f"agrees with {AUTHORS[kind]} in {in_words(accuracy)}"
                if accuracy["low"] <= 0.5:
                    state += ": no better than chance so far, judge more"
                badge = "good" if accuracy["low"] > 0.5 else "accent"
                return Station(name, state, badge, "Train it again", to_train)
    state = "its agreement is being computed" if known.is_scoring else "not measured yet"
    return Station(name, f"{model.name}: {state}", "accent", "Train it again", to_train)


def _running(name: str, project: Project, run: TrainRun) -> Station:
    percent = f", {100 * run.step // run.steps} %" if run.steps else ""
    to_run = reverse("run", args=[project.slug, run.pk])
    state = f"{run.verb} is {run.state}{percent}"
    return Station(name, state, "accent", "Watch the training", to_run, "reviewer")


def _train(project: Project, known: Newest) -> Station:
    to_train = f"{reverse('train', args=[project.slug])}?verb=dpo"
    run = known.policy_run
    if run is None:
        return Station("Train", "no model trained yet", "warn", "Train a model", to_train)
    if run.state in TrainRun.UNFINISHED:
        return _running("Train", project, run)
    if run.state == TrainRun.State.FINISHED:
        name = known.policy.name if known.policy else run.verb
        return Station("Train", f"{name} is trained", "good", "Train again", to_train)
    to_run = reverse("run", args=[project.slug, run.pk])
    return Station("Train", f"{run.verb} {run.state}", "bad", "See why", to_run, "reviewer")


def _compare(project: Project, known: Newest) -> Station:
    policy, comparison = known.policy, known.comparison
    is_new = policy is not None and policy.pk != project.served_id
    if comparison is None or (is_new and policy.pk > comparison.challenger_id):  # pyright: ignore
        if policy is None or not is_new:
            return Station("Compare", "no new model to compare")
        to_model = f"{reverse('model', args=[project.slug, policy.pk])}#compare"
        state = f"{policy.name} is not compared yet"
        return Station("Compare", state, "warn", "Compare it with the served model", to_model)
    to_comparison = reverse("comparison", args=[project.slug, comparison.pk])
    result: Mapping[str, Any] = comparison.result
    if comparison.state == Comparison.State.JUDGING:
        state = f"{result.get('comparisons') or 0} of {comparison.size} pairs judged"
        to_label = reverse("label", args=[project.slug])
        return Station("Compare", state, "accent", "Judge the pairs", to_label, "annotator")
    words = {"promote": "better", "refuse": "not better", "more_needed": "undecided"}
    if comparison.state == Comparison.State.DECIDED:
        decision = str(result.get("decision"))
        state = f"{comparison.challenger.name}: {words.get(decision, decision)}"
        badge = "good" if decision == "promote" else "bad" if decision == "refuse" else "warn"
        return Station("Compare", state, badge, "See the comparison", to_comparison, "reviewer")
    badge = "bad" if comparison.state == Comparison.State.FAILED else "accent"
    state = f"{comparison.challenger.name}: {comparison.state}"
    return Station("Compare", state, badge, "See the comparison", to_comparison, "reviewer")


def _serve(project: Project, known: Newest) -> Station:
    to_models = reverse("models", args=[project.slug])
    if project.served is None:
        return Station("Serve", "no served model", "warn", "Choose a model", to_models)
    comparison = known.comparison
    if (
        comparison is not None
        and comparison.result.get("decision") == "promote"
        and comparison.challenger_id != project.served_id
        and comparison.served_id == project.served_id
    ):
        to_comparison = reverse("comparison", args=[project.slug, comparison.pk])
        action = f"Promote {comparison.challenger.name}"
        return Station("Serve", project.served.name, "warn", action, to_comparison)
    return Station("Serve", project.served.name, "good", "See all models", to_models, "reviewer")
