"""The Django application."""

from django.apps import AppConfig


class FeedbackConfig(AppConfig):
    name = "openpalm.feedback"
    label = "feedback"
    verbose_name = "Human feedback"
    default_auto_field = "django.db.models.BigAutoField"
