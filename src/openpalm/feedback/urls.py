"""The URLs of the site. Each room lists its own."""

from django.urls import include, path

from openpalm.feedback.admin import site

handler400 = "openpalm.feedback.accounts.errors.bad_request"
handler403 = "openpalm.feedback.accounts.errors.forbidden"
handler404 = "openpalm.feedback.accounts.errors.not_found"
handler500 = "openpalm.feedback.accounts.errors.server_error"

urlpatterns = [
    path("", include("openpalm.feedback.accounts.urls")),
    path("", include("openpalm.feedback.manage.urls")),
    path("p/<slug:slug>/", include("openpalm.feedback.labeling.urls")),
    path("p/<slug:slug>/", include("openpalm.feedback.loop.urls")),
    path("api/v1/", include("openpalm.feedback.api.urls")),
    path("admin/", site.urls),
]
