"""URLs under /p/<slug>/ for labelers."""

from django.urls import path

from openpalm.feedback.labeling import history, views

urlpatterns = [
    path("label", views.label, name="label"),
    path("assignments/<int:assignment_id>/submit", views.submit, name="submit"),
    path("assignments/<int:assignment_id>/draft", views.draft, name="draft"),
    path("assignments/<int:assignment_id>/skip", views.skip, name="skip"),
    path("assignments/<int:assignment_id>/flag", views.flag, name="flag"),
    path("assignments/<int:assignment_id>/change", history.change, name="change"),
    path("undo", views.undo, name="undo"),
    path("mine", history.mine, name="mine"),
    path("guidelines", views.guidelines, name="guidelines"),
]
