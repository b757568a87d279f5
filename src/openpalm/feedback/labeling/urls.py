"""URLs under /p/<slug>/ for labelers."""

from django.urls import path

from openpalm.feedback.labeling import chat_views, history, views

urlpatterns = [
    path("label", views.label, name="label"),
    path("assignments/<int:assignment_id>/submit", views.submit, name="submit"),
    path("assignments/<int:assignment_id>/draft", views.draft, name="draft"),
    path("assignments/<int:assignment_id>/skip", views.skip, name="skip"),
    path("assignments/<int:assignment_id>/flag", views.flag, name="flag"),
    path("assignments/<int:assignment_id>/view", views.view, name="view"),
    path("assignments/<int:assignment_id>/change", history.change, name="change"),
    path("undo", views.undo, name="undo"),
    path("chat", chat_views.chat_page, name="chat"),
    path("chat/say", chat_views.say, name="chat-say"),
    path("chat/vote", chat_views.vote, name="chat-vote"),
    path("chat/flag", chat_views.flag, name="chat-flag"),
    path("chat/leave", chat_views.leave, name="chat-leave"),
    path("mine", history.mine, name="mine"),
    path("guidelines", views.guidelines, name="guidelines"),
]
