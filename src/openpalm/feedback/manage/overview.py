"""The overview of a project: what is left, who judged, what waits for a manager.

Counts of items come from an index; figures about judgements were computed by the worker.
"""

from django.db.models import Count
from django.http import HttpResponse
from django.views.decorators.http import require_GET

from openpalm.feedback.accounts.access import ProjectRequest, project_page
from openpalm.feedback.manage.pages import open_flags, page
from openpalm.feedback.models import Item, Job, Project, Prompt, Role, Statistic

MANY = 100
"""a count stops here"""


@require_GET
@project_page(Role.REVIEWER)
def overview(request: ProjectRequest) -> HttpResponse:
    project = request.project
    statistics = Statistic.objects.filter(project=project, name="labelers")
    return page(
        request,
        "overview",
        items=item_counts(project),
        statistics={row.name: row for row in statistics},
        flags=len(open_flags(project).values_list("pk")[: MANY + 1]),
        many=MANY,
        members=project.memberships.count(),
        running=Job.objects.filter(project=project, state__in=Job.UNFINISHED).order_by("id")[:5],
        has_prompts=Prompt.objects.filter(project=project).exists(),
    )


def item_counts(project: Project) -> dict[str, int]:
    """Items by state, and all but the withdrawn ones as `all`."""
    by_state = Item.objects.filter(project=project).order_by().values_list("state")
    counts = dict.fromkeys(Item.State.values, 0) | dict(by_state.annotate(n=Count("pk")))
    return counts | {"all": counts["open"] + counts["complete"]}
