"""URLs of loop/."""

from django.urls import URLPattern

urlpatterns: list[URLPattern] = []
