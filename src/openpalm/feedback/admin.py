"""Django's admin over all tables, for administrators of the site who look for an error.

Nothing is added or deleted here, and judgements, trainings and audit events are read-only: the
pages of the site change them, with checks and the audit log.
"""

from typing import Any

from django.contrib import admin
from django.contrib.auth.views import redirect_to_login
from django.core.paginator import Paginator
from django.db.models import Field, QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.functional import cached_property

from openpalm.feedback import models
from openpalm.feedback.accounts import audit


class Site(admin.AdminSite):
    """For superusers only; they sign in at the site's own page, which is throttled."""

    site_header = site_title = "OpenPaLM feedback: tables"
    index_title = "Tables"
    enable_nav_sidebar = False

    def has_permission(self, request: HttpRequest) -> bool:
        return request.user.is_active and request.user.is_superuser

    def login(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        return redirect_to_login(request.GET.get("next") or reverse("admin:index"))


site = Site()
SECRET = {"password", "digest"}
"""fields that the admin never shows"""
EDITABLE: dict[type, tuple[str, ...]] = {
    models.User: ("is_active", "is_superuser", "is_staff", "email", "first_name", "last_name"),
    models.Item: ("priority",),
}


class FirstRows(Paginator):
    """Pages of the newest rows only: counting all rows of a large table takes seconds."""

    MOST = 5000

    @cached_property
    def count(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows: Any = self.object_list
        plain = rows.prefetch_related(None).order_by()
        return len(plain.values_list("pk")[: self.MOST])


class ReadMostly(admin.ModelAdmin):
    """Shows every field but secrets; only the fields in EDITABLE change, with an audit event."""

    list_per_page = 50
    paginator = FirstRows
    show_full_result_count = False
    ordering = ("-pk",)
    actions = None

    def get_list_display(self, request: HttpRequest) -> list[str]:
        return [
            "pk",
            *(
                field.name
                for field in self._shown()
                if field.get_internal_type() not in ("TextField", "JSONField")
                and not field.primary_key
            ),
        ][:8]

    def get_list_select_related(self, request: HttpRequest) -> list[str]:
        """No joins: SQLite would sort all rows of a large table before it takes a page."""
        return []

    def get_queryset(self, request: HttpRequest) -> "QuerySet[Any]":
        """Prefetches related rows: one query for each relation, not for each row."""
        shown = self.get_list_display(request)
        relations = [f.name for f in self._shown() if f.is_relation and f.name in shown]
        return super().get_queryset(request).prefetch_related(*relations)

    def get_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        return [field.name for field in self._shown()]

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> list[str]:
        editable = EDITABLE.get(self.model, ())
        return [field.name for field in self._shown() if field.name not in editable]

    def _shown(self) -> list["Field[Any, Any]"]:
        return [field for field in self.model._meta.fields if field.name not in SECRET]

    def has_add_permission(self, request: HttpRequest, *given: Any) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return self.model in EDITABLE and super().has_change_permission(request, obj)

    def save_model(self, request: Any, obj: Any, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        audit.record(
            "table.changed",
            user=request.user,
            target=f"{self.model._meta.model_name} {obj.pk}",
            fields=form.changed_data,
        )


for name in models.__all__:
    model = getattr(models, name)
    if hasattr(model, "_meta"):
        site.register(model, ReadMostly)
