"""Blind comparisons of a challenger with the served model, on held-out prompts.

A comparison is planned with a size. Its result is looked at when all its pairs are judged, not
after each judgement; extend() plans a further look. Only people's judgements count, or, in a
project that says so (`Project.decided_by`), only those of simulated labelers; never a model's.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from django.db import transaction
from django.db.models import Prefetch, QuerySet
from django.utils import timezone

from openpalm.base import jsonl
from openpalm.errors import DataError
from openpalm.feedback.accounts import audit
from openpalm.feedback.items.new_items import make_item
from openpalm.feedback.models import (
    Candidate,
    Comparison,
    Item,
    ItemCandidate,
    Job,
    ModelVersion,
    Project,
    Prompt,
    Response,
    SnapshotJudgement,
    TrainRun,
    User,
)
from openpalm.feedback.statistics import style
from openpalm.feedback.statistics.promotion import MINIMUM, Vote, decide
from openpalm.feedback.training.answers import (
    Wanted,
    answer_key,
    check_sampling,
    generate,
    sampling_of,
    stored_answers,
)
from openpalm.feedback.training.commands import prompts_path
from openpalm.feedback.training.registry import POLICY, ancestors
from openpalm.feedback.training.servers import serving
from openpalm.feedback.worker import jobs
from openpalm.feedback.worker.progress import Progress, Writing

State = Comparison.State
PRIORITY = 100.0
"""before items of training: a promotion waits for them"""
MOST_PAIRS = 10_000
DRAWS = 3
"""times that a prompt is asked again because both models answer the same"""


@transaction.atomic
def create(
    project: Project,
    challenger: ModelVersion,
    user: User | None,
    *,
    size: int = MINIMUM,
    sampling: dict[str, Any] | None = None,
) -> Comparison:
    """Queues the comparison with the model that is served now. Raises DataError."""
    served = project.served
    if served is None:
        raise DataError("this project has no served model to compare with; choose one first")
    for model in (challenger, served):
        if model.project_id != project.pk or model.kind != POLICY or not model.path:
            raise DataError(f"the model {model} cannot answer: it has no checkpoint here")
    if challenger == served:
        raise DataError(f"the model {challenger} is the served model already")
    available = len(usable_prompts(project, (challenger, served)))
    if size < MINIMUM:
        raise DataError(f"size {size}: a comparison needs {MINIMUM} pairs or more")
    if available < size:
        raise DataError(
            f"{available} held-out prompts were never trained on, and {size} are needed: add "
            "prompts, or hold more of them out before the next training"
        )
    comparison = Comparison.objects.create(
        project=project,
        challenger=challenger,
        served=served,
        size=size,
        created_by=user,
        result={"sampling": check_sampling(sampling or {}), "author_kind": project.decided_by},
    )
    jobs.enqueue("compare", project=project, user=user, comparison=comparison.pk)
    audit.record(
        "comparison.started", user=user, project=project, target=challenger, served=str(served)
    )
    return comparison


def can_extend(comparison: Comparison) -> bool:
    """Whether its last look left it undecided, and no further pairs are being made."""
    is_waiting = comparison.state == State.GENERATING
    return comparison.result.get("decision") == "more_needed" and not is_waiting


@transaction.atomic
def extend(comparison: Comparison, further: int, user: User | None) -> Comparison:
    """Plans more pairs after an undecided look. Raises DataError."""
    # The row as it is now, locked: of two managers at the same time only one extends it.
    rows = Comparison.objects.select_related("project", "challenger", "served")
    comparison = rows.select_for_update(of=("self",)).get(pk=comparison.pk)
    if not can_extend(comparison):
        raise DataError("only a comparison that was judged whole and is undecided can be extended")
    models = (comparison.challenger, comparison.served)
    available = len(usable_prompts(comparison.project, models))
    if not 1 <= further <= available - comparison.size:
        raise DataError(f"{available - comparison.size} held-out prompts are left; choose as many")
    comparison.size += further
    comparison.state = State.GENERATING
    comparison.save(update_fields=["size", "state"])
    jobs.enqueue("compare", project=comparison.project, user=user, comparison=comparison.pk)
    audit.record(
        "comparison.extended",
        user=user,
        project=comparison.project,
        target=comparison.challenger,
        comparison=comparison.pk,
        further=further,
    )
    return comparison


def usable_prompts(project: Project, models: Sequence[ModelVersion]) -> list[int]:
    """Ids of held-out prompts that no training of these models, or of their ancestors, has read."""
    found = Prompt.objects.filter(project=project, held_out=True)
    in_snapshot = SnapshotJudgement.objects.filter(snapshot__project=project)
    found = found.exclude(pk__in=in_snapshot.values("response__item__prompt"))
    gold = Item.objects.filter(project=project, purpose=Item.Purpose.GOLD)
    ids = found.exclude(pk__in=gold.values("prompt")).order_by("id").values_list("id", flat=True)
    trained = _prompts_of_rollouts(models)
    return [pk for pk in ids if pk not in trained]


def _prompts_of_rollouts(models: Sequence[ModelVersion]) -> set[int]:
    """Prompts that PPO has sampled from: they are in no snapshot."""
    runs = {each.run_id for model in models for each in ancestors(model) if each.run_id}
    found: set[int] = set()
    for run in TrainRun.objects.filter(pk__in=runs, verb="ppo"):
        path = prompts_path(run)
        if path.exists():
            found |= {row["id"] for row in jsonl.read_rows(path) if isinstance(row.get("id"), int)}
    return found


# --- in the worker


def run(job: Job, progress: Progress) -> dict[str, Any]:
    """The handler of "compare": both models' answers and the items to judge."""
    comparison = Comparison.objects.select_related("project", "challenger", "served").get(
        pk=job.arguments["comparison"]
    )
    made = _Pairs(comparison, progress).make()
    with progress.writing():
        comparison.state = State.JUDGING
        comparison.result |= {"shown": made["shown"], "equal": made["equal"]}
        comparison.save(update_fields=["state", "result"])
    compute(comparison, progress.writing)
    return made


class _Pairs:
    """Makes the items of a comparison; an attempt after a kill finds what is there."""

    def __init__(self, comparison: Comparison, progress: Progress):
        self.comparison = comparison
        self.progress = progress
        self.sampling = comparison.result.get("sampling", {})
        self.ids = usable_prompts(comparison.project, (comparison.challenger, comparison.served))

    def make(self) -> dict[str, Any]:
        """Goes through the prompts until `size` pairs are there.

        Prompts at which both models answer the same show nothing; they are asked again with
        another seed only if the others do not suffice.
        """
        items = self.comparison.items
        self.progress.start(self.comparison.size)
        shown = set(items.values_list("prompt_id", flat=True))
        waiting = [pk for pk in self.ids if pk not in shown]
        equal: list[int] = []
        for draw in range(DRAWS):
            equal = []
            while waiting and (missing := self.comparison.size - items.count()) > 0:
                group, waiting = waiting[:missing], waiting[missing:]
                equal += self._show(group, draw)
            waiting = equal
        if not items.exists():
            raise DataError(
                "both models give the same answer to every held-out prompt; there is nothing to "
                "judge (a higher temperature lets them differ)"
            )
        return {"shown": items.count(), "equal": len(equal)}

    def _show(self, ids: Sequence[int], draw: int) -> list[int]:
        """Makes the items of these prompts; returns the prompts with equal answers."""
        equal: list[int] = []
        prompts = list(Prompt.objects.filter(pk__in=ids).order_by("id"))
        models = self.comparison.challenger, self.comparison.served
        ours, theirs = (self._answers(model, prompts, draw) for model in models)
        for prompt in prompts:
            pair = ours.get(prompt.pk), theirs.get(prompt.pk)
            if pair[0] is None or pair[1] is None:
                continue  # the server refused the prompt; it is counted in the job's message
            if pair[0].text.strip() == pair[1].text.strip():
                equal.append(prompt.pk)
                continue
            self._item(prompt, [pair[0], pair[1]])
        self.progress.move_to(self.comparison.items.count())
        return equal

    def _answers(
        self, model: ModelVersion, prompts: Sequence[Prompt], draw: int
    ) -> dict[int, Candidate]:
        samplings = {p.pk: sampling_of(model, p, self.sampling, draw) for p in prompts}
        wanted = (Wanted(prompt, samplings[prompt.pk]) for prompt in prompts)
        with serving(model, self.progress) as server:
            self.progress.say(f"{model} answers held-out prompts")
            generate(server, model, wanted, self.progress.quiet())
        stored = stored_answers(model, [prompt.pk for prompt in prompts])
        keys = {pk: answer_key(pk, sampling) for pk, sampling in samplings.items()}
        return {pk: stored[key] for pk, key in keys.items() if key in stored}

    def _item(self, prompt: Prompt, candidates: list[Candidate]) -> None:
        with self.progress.writing():
            make_item(
                self.comparison.project,
                prompt,
                candidates,
                purpose=Item.Purpose.COMPARISON,
                comparison=self.comparison,
                priority=PRIORITY,
            )


def compute_all(project: Project, writing: Writing = transaction.atomic) -> None:
    """The results of the project's comparisons that are being judged; for the statistics job."""
    found = Comparison.objects.filter(project=project, state=State.JUDGING)
    for comparison in found.select_related("project"):
        compute(comparison, writing)


def compute(comparison: Comparison, writing: Writing = transaction.atomic) -> None:
    """Stores the figures so far and, once all pairs are judged, the decision of this look."""
    votes = list(votes_of(comparison))
    whole = (
        comparison.items.exists() and not comparison.items.filter(state=Item.State.OPEN).exists()
    )
    decision = _decide(comparison, votes)
    rate = decision["win_rate"] or {}
    result = comparison.result | {
        "figures": decision,
        "wins": decision["outcomes"]["win"],
        "losses": decision["outcomes"]["loss"],
        "ties": decision["outcomes"]["tie"],
        "both_bad": decision["outcomes"]["both_bad"],
        "win_rate": rate.get("value"),
        "low": rate.get("low"),
        "high": rate.get("high"),
        "comparisons": decision["comparisons"],
        "needed": decision["further"],
        "decision": decision["verdict"] if whole else "judging",
        "reason": decision["reason"] if whole else _waiting(comparison, decision),
    }
    comparison.result, comparison.computed_at = result, timezone.now()
    if whole:
        comparison.state = State.DECIDED
        comparison.result["looks"] = _look(comparison)
        newest = Response.objects.filter(item__comparison=comparison).order_by("-id").first()
        comparison.result["newest"] = newest.pk if newest else 0
    with writing():
        comparison.save(update_fields=["result", "computed_at", "state"])


def _decide(comparison: Comparison, votes: Sequence[Vote]) -> dict[str, Any]:
    """The figures of the votes; "promote" only if it holds with withdrawn pairs as lost ones."""
    look = _look(comparison)
    found = decide(votes, style_features=style.FEATURES, look=look)
    lost = lost_by_withdrawal(comparison)
    figures = found.to_json()
    if lost and found.verdict == "promote":
        strict = decide([*votes, *lost], style_features=style.FEATURES, look=look)
        if strict.verdict != "promote":
            reason = f"{len(lost)} withdrawn pairs count as lost. {strict.reason}"
            figures |= {"verdict": strict.verdict, "reason": reason, "further": strict.further}
    return figures


def judgements_left(comparison: Comparison) -> int:
    """How many judgements of the decision are in force still."""
    newest = comparison.result.get("newest", 0)
    return _counted(comparison).filter(pk__lte=newest).count()


def _waiting(comparison: Comparison, decision: dict[str, Any]) -> str:
    left = comparison.items.filter(state=Item.State.OPEN).count()
    judged = decision["comparisons"]
    return f"{judged} pairs are judged, {left} open; it is decided when all are judged"


def _look(comparison: Comparison) -> int:
    """The number of this look at the challenger: those of other comparisons count too."""
    others = Comparison.objects.filter(
        project=comparison.project_id, challenger=comparison.challenger_id
    ).exclude(pk=comparison.pk)
    # A comparison that failed later still counts as a look.
    earlier = sum(int(other.result.get("looks", other.state == State.DECIDED)) for other in others)
    return earlier + int(comparison.result.get("looks", 0)) + 1


def votes_of(comparison: Comparison) -> Iterator[Vote]:
    """The judgements that count, each as a vote for or against the challenger."""
    for response in _counted(comparison).iterator(chunk_size=1000):
        position = _position(response.item, comparison)
        outcome = _outcome(response.payload, position)
        if outcome is None:
            continue
        yield Vote(
            prompt=response.item.prompt_id,
            outcome=outcome,  # pyright: ignore[reportArgumentType]
            challenger_left=response.assignment.order[0] == position,
            author_kind=response.author_kind,  # pyright: ignore[reportArgumentType]
            style=_style(response.item, position),
        )


def _position(item: Item, comparison: Comparison) -> int:
    """Position of the challenger's answer among the two."""
    first = next(iter(item.places.all()))
    return 0 if first.candidate.model_id == comparison.challenger_id else 1


def _style(item: Item, position: int) -> tuple[float, ...]:
    texts = [place.candidate.text for place in item.places.all()]
    ours, theirs = texts[position], texts[1 - position]
    return style.style_difference(style.style_of(ours), style.style_of(theirs))


def lost_by_withdrawal(comparison: Comparison) -> list[Vote]:
    """A vote for the served model for each pair that was withdrawn before anybody judged it.

    Otherwise whoever withdraws pairs could end a comparison at a moment that favours the
    challenger: the figures are shown while it is judged.
    """
    withdrawn = comparison.items.filter(state=Item.State.WITHDRAWN)
    withdrawn = withdrawn.exclude(pk__in=_counted(comparison).order_by().values("item"))
    kind = comparison.result.get("author_kind", User.Kind.PERSON)
    pairs = withdrawn.prefetch_related(_PLACES).order_by("id")
    return [
        Vote(item.prompt_id, "loss", False, kind, _style(item, _position(item, comparison)))
        for item in pairs
    ]


_PLACES = Prefetch("places", ItemCandidate.objects.select_related("candidate"))


def _counted(comparison: Comparison) -> "QuerySet[Response]":
    """Judgements in force by the kind of labelers that decides here; repetitions do not count."""
    return (
        Response.objects.filter(
            item__comparison=comparison,
            in_force=True,
            kind="compare",
            author_kind=comparison.result.get("author_kind", User.Kind.PERSON),
            assignment__repeat=0,
        )
        .select_related("item", "assignment")
        # Joined: SQLite refuses Django's prefetch of 999 candidates and more.
        .prefetch_related(
            Prefetch("item__places", ItemCandidate.objects.select_related("candidate"))
        )
        .order_by("id")
    )


def _outcome(payload: dict[str, Any], challenger: int) -> str | None:
    match payload:
        case {"better": better}:
            return "win" if better == challenger else "loss"
        case {"tie": _}:
            return "tie"
        case {"both_bad": _}:
            return "both_bad"
    return None
