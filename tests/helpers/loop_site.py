"""A site with a project after one round: models, a training at work, a comparison."""

from feedback_site import Site

PASSWORD = "correct horse battery"
USER = "ada"
SLUG = "demo"

# Runs in `openpalm feedback manage shell`.
SEED = """
from openpalm.feedback.models import *
from openpalm.feedback.items.new_items import NewCandidate, NewItem, add_items
user = User.objects.create_superuser("ada", password="correct horse battery")
project = Project.objects.create(slug="demo", name="Helpful answers")
Guideline.objects.create(project=project, version=1, text="Be *kind*.")
base = ModelVersion.objects.create(project=project, name="base", path="/none/base", checkpoint="b")
project.served = base
project.save()
reward_run = TrainRun.objects.create(project=project, verb="reward", parent=base, state="finished")
for n in range(2):
    ModelVersion.objects.create(
        project=project, name=f"reward.{n}", kind="reward", run=reward_run, path=f"/none/r{n}"
    )
snapshot = Snapshot.objects.create(
    project=project, digest="ab" * 32, path="/none", judgements=0, created_by=user,
    counts={"author_kind": {"person": 3, "simulated": 2}, "kind": {"compare": 5}},
)
run = TrainRun.objects.create(
    project=project, verb="dpo", parent=base, snapshot=snapshot, state="running", step=30,
    steps=120, curve=[[1, 0.7], [2, 0.5]], figures={"loss": 0.5}, alarms=["answers all alike"],
    directory="/none/1", command=["openpalm", "dpo"],
)
new = ModelVersion.objects.create(project=project, name="new", run=run, parent=base, path="/none/n")
rate = {"value": 0.6, "low": 0.53, "high": 0.67}
Comparison.objects.create(
    project=project, challenger=new, served=base, state="decided", created_by=user,
    result={
        "decision": "more_needed", "comparisons": 200, "needed": 80, "reason": "Undecided",
        "figures": {"win_rate": rate, "left_share": rate, "outcomes": {"win": 120, "loss": 80},
                    "judged_by": {"person": 200}, "warnings": ["Labelers prefer the left side"]},
    },
)
Promotion.objects.create(
    project=project, model=base, by=user, state="done", override_reason="it is the first one"
)
add_items(project, [
    NewItem(
        [{"role": "user", "content": f"question {n}"}],
        tuple(NewCandidate(text, "", None, None) for text in ("yes", "no")),
        "typed",
    )
    for n in range(20)
])
"""
# Figures as the worker stores them.
FIGURES = """
from datetime import timedelta
from django.utils import timezone
from openpalm.feedback.models import *
project = Project.objects.get()
# Of a worker elsewhere, so that the site's own computes none in their place.
Job.objects.create(
    project=project, kind="statistics", state="running", worker="elsewhere:1:1",
    heartbeat_at=timezone.now() + timedelta(days=1),
)
rate = {"value": 0.71, "low": 0.61, "high": 0.8}
first = ModelVersion.objects.filter(kind="reward").first()
bins = [
    {"low": 0.5 + n / 20, "high": 0.55 + n / 20, "judgements": 9, "mean_confidence": 0.52 + n / 20,
     "agreement": rate}
    for n in range(10)
]
strengths = [
    {"model": name, "group": 0, "value": n - 0.5, "low": n - 0.9, "high": n - 0.1,
     "comparisons": 50, "bounded": True}
    for n, name in enumerate(("base", "new"))
]
row = {"model": first.pk, "name": first.name, "accuracy": rate, "judgements": 90, "items": 60}
labeler = {"judgements": 5, "median_s": 4.5, "gold": rate, "gold_items": 5, "left": rate}
for name, value in {
    "reward_agreement": {"person": {"arm": "random", "people": rate, "models": [row]}},
    "agreement": {"person": {"raw": rate, "alpha": rate, "gwet": rate, "items": 9}},
    "calibration": {"person": {"bins": bins, "expected_error": 0.1, "brier": 0.2}},
    "disagreements": {"rows": [{"item": Item.objects.first().pk, "margin": 2, "judgements": 2}]},
    "board": {"person": {"plain": {"strengths": strengths}, "styled": {"strengths": strengths}}},
    "labelers": {"rows": [
        labeler | {"name": kind, "author_kind": kind} for kind in ("person", "simulated", "model")
    ]},
    "alarms": {"rows": [{"model": first.pk, "name": first.name, "line": "it is being gamed"}]},
}.items():
    Statistic.objects.update_or_create(project=project, name=name, defaults={"value": value})
"""

# Nothing that a checkpoint would be needed for.
NO_CHECKPOINTS = """
from openpalm.feedback.models import *
Job.objects.all().delete()
ModelVersion.objects.filter(kind="reward").delete()
ModelVersion.objects.update(path="")
"""


def seed(site: Site) -> None:
    site.manage("shell", "-c", SEED)
    site.manage("shell", "-c", FIGURES)
