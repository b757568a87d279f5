"""URLs of the site outside projects: accounts, invitations, tokens."""

from django.contrib.auth import views as auth
from django.urls import path

from openpalm.feedback.accounts import people, sign_in, views
from openpalm.feedback.accounts.access import public_page, signed_in_page

urlpatterns = [
    path("healthz", views.healthz, name="healthz"),
    path("setup", views.setup, name="setup"),
    path("login", public_page(sign_in.LoginView.as_view()), name="login"),
    path("logout", public_page(auth.LogoutView.as_view()), name="logout"),
    path("people", people.people, name="people"),
    path("people/<int:user_id>/reset", people.reset_link, name="reset-link"),
    path("reset/<int:user_id>/<str:secret>", people.reset, name="reset"),
    path("account", views.account, name="account"),
    path("account/password", signed_in_page(sign_in.PasswordView.as_view()), name="password"),
    path("account/tokens", views.token_new, name="token-new"),
    path("account/tokens/<int:token_id>/revoke", views.token_revoke, name="token-revoke"),
    path("invite/<str:secret>", views.invitation, name="invitation"),
]
