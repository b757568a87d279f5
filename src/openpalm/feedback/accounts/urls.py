"""URLs of the site outside projects: accounts, invitations, tokens."""

from django.contrib.auth import views as auth
from django.urls import path

from openpalm.feedback.accounts import views
from openpalm.feedback.accounts.access import public_page

urlpatterns = [
    path("", views.home, name="home"),
    path("healthz", views.healthz, name="healthz"),
    path("setup", views.setup, name="setup"),
    path(
        "login",
        public_page(auth.LoginView.as_view(template_name="feedback/login.html")),
        name="login",
    ),
    path("logout", public_page(auth.LogoutView.as_view()), name="logout"),
]
