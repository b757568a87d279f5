"""Throttles password guessing: failed attempts count by name and by address.

After FREE failures for a name within WINDOW, each further attempt must wait twice as long as the
one before, at most LONGEST; the same after FREE_BY_ADDRESS failures from an address. An attempt
that comes too early is refused without looking at the password. Names that do not exist count in
the same way, so that the answers say nothing about which names exist.
"""

import ipaddress
import unicodedata
from datetime import datetime, timedelta

from django.conf import settings
from django.http import HttpRequest
from django.utils import timezone

from openpalm.feedback.models import LoginFailure

WINDOW = timedelta(minutes=30)
LONGEST = timedelta(minutes=15)
FREE, FREE_BY_ADDRESS = 5, 30
MAY_DIFFER = timedelta(minutes=1)
"""clocks of machines that share the database"""
NOT_COUNTED = "(api token)"
"""the name under which api/protocol/tokens.py counts wrong tokens, by a rule of its own"""


def address_of(request: HttpRequest) -> str:
    """The visitor's address; for IPv6 its /64 network, since one visitor can use all of it.

    Visitors can write X-Forwarded-For, but each of our proxies adds an entry at its end. Behind n
    proxies the n-th from the end is the visitor's. A shorter list did not pass all of them and
    is ignored.
    """
    address = request.META.get("REMOTE_ADDR", "")
    forwarded, proxies = request.META.get("HTTP_X_FORWARDED_FOR"), settings.FEEDBACK_PROXIES
    if proxies and forwarded and len(entries := forwarded.split(",")) >= proxies:
        address = entries[-proxies].strip()
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address) and not parsed.ipv4_mapped:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def seconds_to_wait(name: str, address: str) -> int:
    """How long the next attempt for this name from this address must wait; 0: not at all."""
    by_address = seconds_for_address(address)
    return max(_wait(list(_times(name=_key(name))), FREE), by_address)


def seconds_for_address(address: str) -> int:
    """How long the next attempt from this address must wait, whatever its name."""
    LoginFailure.objects.filter(created_at__lt=timezone.now() - WINDOW).delete()
    return 0 if _is_shared(address) else _wait(list(_times(address=address)), FREE_BY_ADDRESS)


def begin_attempt(name: str, address: str) -> LoginFailure:
    """Counts an attempt as failed before the password is checked.

    Attempts that arrive together would otherwise all pass before the first of them counts.
    """
    return LoginFailure.objects.create(name=_key(name), address=address)


def succeeded(attempt: LoginFailure) -> None:
    """Forgets the failures of the name; those of other names from this address stay."""
    LoginFailure.objects.filter(name=attempt.name).delete()


def _is_shared(address: str) -> bool:
    """Whether many visitors share it: an unknown address, or that of a proxy on this machine."""
    return address == "unknown" or ipaddress.ip_network(address).is_loopback


def _key(name: str) -> str:
    """The name as the account has it. Similar names are different accounts: a success of
    one must not clear the failures of the other."""
    return unicodedata.normalize("NFKC", name.strip())[:150]


def _times(**of: str):
    # Of a time to come: the clock was set back since. They would lock everybody out until then.
    soon = timezone.now() + MAY_DIFFER
    failures = LoginFailure.objects.filter(**of, created_at__lte=soon).exclude(name=NOT_COUNTED)
    failures = failures.order_by("-created_at")
    return failures.values_list("created_at", flat=True)[:200]


def _wait(times: list[datetime], free: int) -> int:
    if len(times) < free:
        return 0
    delay = min(timedelta(seconds=2 ** min(len(times) - free, 20)), LONGEST)
    left = times[0] + delay - timezone.now()
    return max(0, -(-left // timedelta(seconds=1)))
