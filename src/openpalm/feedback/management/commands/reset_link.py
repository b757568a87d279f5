"""Prints a link that sets a new password: for the administrator who lost it."""

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from openpalm.errors import DataError
from openpalm.feedback.accounts.password_reset import link_path
from openpalm.feedback.models import User


class Command(BaseCommand):
    help = "Prints a link that sets a new password of an account, once, within a day."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("user", help="name of the account")
        parser.add_argument(
            "--url",
            default="http://127.0.0.1:8080",
            help="of the site; default %(default)s",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        user = User.objects.filter(username=options["user"]).first()
        if user is None:
            raise CommandError(f"there is no user {options['user']!a}")
        try:
            path = link_path(user, None)
        except DataError as error:
            raise CommandError(f"{error}") from None
        self.stdout.write(f"{options['url'].rstrip('/')}{path}")
