"""Pages of comparisons with the served model, and of promotion, its refusal and its undoing."""

from collections.abc import Mapping
from typing import Any

from django.contrib import messages
from django.http import HttpResponse
from django.shortcuts import redirect
from django.views.decorators.http import require_GET, require_POST

from openpalm.errors import DataError
from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.accounts.errors import sentence
from openpalm.feedback.loop import plots
from openpalm.feedback.loop.figures import estimate, mapping
from openpalm.feedback.loop.forms import CompareForm, ExtendForm
from openpalm.feedback.loop.pages import live_page, page, refused
from openpalm.feedback.manage.pages import find
from openpalm.feedback.models import Comparison, ModelVersion, Promotion, Role
from openpalm.feedback.paging import id_of, page_of
from openpalm.feedback.statistics.promotion import MINIMUM
from openpalm.feedback.training import comparisons, promotion

OPEN = (Comparison.State.GENERATING, Comparison.State.JUDGING)
OUTCOMES = {"win": "wins", "loss": "losses", "tie": "ties", "both_bad": "both bad"}


@require_GET
@project_page(Role.REVIEWER)
def comparison_list(request: ProjectRequest) -> HttpResponse:
    found = Comparison.objects.filter(project=request.project)
    listed = page_of(found.select_related("challenger", "served"), request, 20)
    shown = [(row, win_rate_plot(row), plots.in_words(win_rate(row))) for row in listed.rows]
    return page(request, "comparisons", page=listed, rows=shown)


def win_rate(comparison: Comparison) -> Mapping[str, Any] | None:
    figures = mapping(comparison.result.get("figures"))
    return estimate(figures.get("win_rate"))


def win_rate_plot(comparison: Comparison) -> plots.Plot | None:
    return plots.interval(win_rate(comparison))


@require_POST
@project_page(Role.ADMIN)
def compare(request: ProjectRequest, model_id: int) -> HttpResponse:
    """Starts a comparison of the model with the served one."""
    slug = request.project.slug
    model = find(ModelVersion.objects.all(), model_id, request)
    form = CompareForm(request.POST)
    if not form.is_valid():
        name, errors = next(iter(form.errors.items()))
        return refused(
            request, f"{form.fields[name].label or name}: {errors[0]}", "model", slug, model.pk
        )
    given = form.cleaned_data
    try:
        comparison = comparisons.create(
            request.project,
            model,
            request.user,
            size=given["size"],
            sampling={k: given[k] for k in ("temperature", "max_tokens")},
        )
    except DataError as error:
        return refused(request, f"No comparison: {error}.", "model", slug, model.pk)
    messages.success(request, "Both models answer held-out prompts now.")
    return redirect("comparison", slug, comparison.pk)


@require_GET
@project_page(Role.REVIEWER)
def comparison(request: ProjectRequest, comparison_id: int) -> HttpResponse:
    """With htmx, only the figures, which reload while pairs are judged."""
    found = Comparison.objects.select_related("challenger", "served", "project", "created_by")
    row = find(found, comparison_id, request)
    figures = mapping(row.result.get("figures"))
    promotions = list(Promotion.objects.filter(comparison=row).select_related("by").order_by("-id"))
    return live_page(
        request,
        "comparison",
        state=row.state,
        comparison=row,
        result=row.result,
        figures=figures,
        is_open=row.state in OPEN,
        judged=row.result.get("comparisons") or 0,
        bars=bars(figures),
        outcomes=[(OUTCOMES.get(k, k), v) for k, v in mapping(figures.get("outcomes")).items()],
        minimum=MINIMUM,
        refusal=promotion.refusal(row, row.challenger),
        is_served=row.challenger_id == request.project.served_id,
        promotions=promotions,
        is_loading=any(each.state == Promotion.State.QUEUED for each in promotions),
        extend_form=ExtendForm(initial={"further": row.result.get("needed") or None}),
        can_extend=comparisons.can_extend(row),
    )


def bars(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The intervals that the decision is about, each with one half as its reference."""
    named = (
        ("win_rate", "wins of the challenger", "a tie counts half; 95 %"),
        ("at_equal_style", "wins at equal length and style", "what style does not explain"),
        ("left_share", "choices of the left side", "one half: no position bias"),
    )
    return [
        {
            "name": name,
            "note": note,
            "words": plots.in_words(figure),
            "plot": plots.interval(figure),
        }
        for key, name, note in named
        if (figure := estimate(figures.get(key)))
    ]


@require_POST
@project_page(Role.ADMIN)
def extend(request: ProjectRequest, comparison_id: int) -> HttpResponse:
    """Adds pairs to an undecided comparison."""
    slug = request.project.slug
    row = find(Comparison.objects.select_related("challenger"), comparison_id, request)
    form = ExtendForm(request.POST)
    if not form.is_valid():
        return refused(
            request, f"Further pairs: {form.errors['further'][0]}", "comparison", slug, row.pk
        )
    further = form.cleaned_data["further"]
    try:
        comparisons.extend(row, further, request.user)
    except DataError as error:
        return refused(request, f"Not extended: {error}.", "comparison", slug, row.pk)
    messages.success(request, f"{further} further pairs are being made.")
    return redirect("comparison", slug, row.pk)


@require_POST
@project_page(Role.ADMIN)
def promote(request: ProjectRequest, model_id: int) -> HttpResponse:
    """Proposes the promotion; with a reason it overrides the refusal of the comparison."""
    slug = request.project.slug
    model = find(ModelVersion.objects.all(), model_id, request)
    rows = Comparison.objects.select_related("project", "challenger", "served")
    about = id_of(request.POST.get("comparison", ""))
    row = None if about is None else find(rows, about, request)
    back = ("comparison", slug, row.pk) if row else ("model", slug, model.pk)
    reason = request.POST.get("override_reason", "").replace("\0", "")[:2000]
    try:
        promotion.propose(
            request.project, model, request.user, comparison=row, override_reason=reason
        )
    except DataError as error:
        return refused(request, sentence(error), *back)
    messages.success(
        request, f"The server loads {model.name}; requests in flight finish on the model before."
    )
    return redirect(*back)


@require_POST
@project_page(Role.ADMIN)
def promotion_undo(request: ProjectRequest, promotion_id: int) -> HttpResponse:
    """Serves the model before the promotion again."""
    slug = request.project.slug
    rows = Promotion.objects.select_related("project", "model", "previous")
    row = find(rows, promotion_id, request)
    try:
        promotion.undo(row, request.user)
    except DataError as error:
        return refused(request, f"Not undone: {error}.", "models", slug)
    messages.success(request, f"The server loads {row.previous} again.")
    return redirect("models", slug)
