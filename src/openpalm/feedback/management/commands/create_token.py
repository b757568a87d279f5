"""Makes an API token from the command line, for scripts; the account page does the same."""

from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.utils import timezone

from openpalm.feedback.accounts import audit, tokens
from openpalm.feedback.models import ApiToken, Membership, Project, User


class Command(BaseCommand):
    help = "Prints a new token of the REST API. It is shown only now; a hash of it is stored."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("user", help="the token has at most the rights of this user")
        parser.add_argument("--scopes", nargs="+", choices=ApiToken.SCOPES, required=True)
        parser.add_argument("--project", help="slug of the only project; default: all of the user")
        parser.add_argument("--days", type=int, default=90, help="valid for; default 90")
        parser.add_argument("--name", default="create_token", help="what will use it")

    @transaction.atomic
    def handle(self, *args: Any, **options: Any) -> None:
        user = User.objects.filter(username=options["user"], is_active=True).first()
        if user is None:
            raise CommandError(f"there is no user {options['user']!a}")
        if not 1 <= options["days"] <= 3650:
            raise CommandError(f"--days {options['days']}: must be 1 to 3650")
        project = _project(user, options["project"]) if options["project"] else None
        text = tokens.issue(
            user,
            options["name"][:100],
            options["scopes"],
            project=project,
            expires_at=timezone.now() + timedelta(days=options["days"]),
        )
        target = f"{user.username}: {options['name']}"
        audit.record("token.made", user=None, project=project, target=target, by="command line")
        self.stdout.write(text)


def _project(user: User, slug: str) -> Project:
    project = Project.objects.filter(slug=slug).first()
    is_member = Membership.objects.filter(project=project, user=user).exists()
    if project is None or not (is_member or user.is_superuser):
        raise CommandError(f"there is no project {slug!a} of which {user.username} is a member")
    return project
