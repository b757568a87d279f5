"""URLs of api/."""

from django.urls import URLPattern

urlpatterns: list[URLPattern] = []
