"""The URLs of the site. Each room lists its own."""

from django.contrib import admin
from django.urls import include, path

handler404 = "openpalm.feedback.accounts.views.not_found"

urlpatterns = [
    path("", include("openpalm.feedback.accounts.urls")),
    path("", include("openpalm.feedback.manage.urls")),
    path("p/<slug:slug>/", include("openpalm.feedback.labeling.urls")),
    path("p/<slug:slug>/", include("openpalm.feedback.loop.urls")),
    path("api/v1/", include("openpalm.feedback.api.urls")),
    path("admin/", admin.site.urls),
]
