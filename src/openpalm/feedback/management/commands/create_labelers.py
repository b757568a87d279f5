"""Adds labelers to a project and prints a token of the REST API for each."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import transaction

from openpalm.feedback.accounts import audit, tokens
from openpalm.feedback.models import Membership, Project, Role, User

SCOPES = ("projects:read", "responses:read", "responses:write")


class Command(BaseCommand):
    help = (
        "Adds simulated labelers (or AI judges) to a project. Prints a line for each: its name, a "
        "tab, its token, which is shown only now. An existing one gets a new token."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("project", help="slug of the project")
        parser.add_argument("--count", type=int, default=3, help="how many")
        kinds = [User.Kind.SIMULATED, User.Kind.MODEL]
        parser.add_argument("--kind", choices=kinds, default=User.Kind.SIMULATED)
        parser.add_argument("--prefix", help="names are PREFIX-1, ...; default: PROJECT-KIND")

    def handle(self, *args: Any, **options: Any) -> None:
        project = Project.objects.filter(slug=options["project"]).first()
        if project is None:
            raise CommandError(f"there is no project {options['project']!a}")
        if not 1 <= options["count"] <= 1000:
            raise CommandError(f"--count {options['count']}: must be 1 to 1000")
        prefix = options["prefix"] or f"{project.slug}-{options['kind']}"
        for number in range(1, options["count"] + 1):
            name = f"{prefix}-{number}"
            self.stdout.write(f"{name}\t{_add(project, name, options['kind'])}")


@transaction.atomic
def _add(project: Project, name: str, kind: str) -> str:
    """Returns the token. A person's account is never turned into a labeler of another kind."""
    user = User.objects.filter(username=name).first()
    if user is None:
        user = User(username=name, kind=kind)
        user.set_unusable_password()
        user.save()
    elif user.kind != kind:
        raise CommandError(f"{name} is a {user.kind}, not {kind}; choose another --prefix")
    Membership.objects.get_or_create(project=project, user=user, defaults={"role": Role.ANNOTATOR})
    audit.record("labeler.added", user=None, project=project, target=name, kind=kind)
    return tokens.issue(user, "create_labelers", SCOPES, project=project)
