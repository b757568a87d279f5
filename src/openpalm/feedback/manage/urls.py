"""URLs of managers: the site, and /p/<slug>/ for one project."""

from django.urls import include, path

from openpalm.feedback.manage import (
    audit_pages,
    exporting,
    generation,
    guidelines,
    items,
    jobs,
    members,
    overview,
    projects,
    prompts,
    responses,
)

_project = [
    path("", overview.overview, name="project"),
    path("settings", projects.settings, name="settings"),
    path("close", projects.close, name="close"),
    path("reopen", projects.reopen, name="reopen"),
    path("leave", members.leave, name="leave"),
    path("guidelines/edit", guidelines.edit, name="guideline-edit"),
    path("guidelines/versions", guidelines.versions, name="guideline-versions"),
    path("members", members.members, name="members"),
    path("members/<int:member_id>/role", members.member_role, name="member-role"),
    path("members/<int:member_id>/remove", members.member_remove, name="member-remove"),
    path("invitations", members.invitation_new, name="invitation-new"),
    path(
        "invitations/<int:invitation_id>/revoke",
        members.invitation_revoke,
        name="invitation-revoke",
    ),
    path("prompts", prompts.prompts, name="prompts"),
    path("prompts/upload", prompts.upload, name="upload"),
    path("prompts/typed", prompts.typed, name="typed"),
    path("prompts/<int:prompt_id>/held-out", prompts.held_out, name="held-out"),
    path("generate", generation.generate, name="generate"),
    path("items", items.items, name="items"),
    path("items/<int:item_id>", items.item, name="item"),
    path("items/<int:item_id>/change", items.item_change, name="item-change"),
    path("items/<int:item_id>/gold", items.item_gold, name="item-gold"),
    path("responses", responses.responses, name="responses"),
    path("responses/<int:response_id>/delete", responses.response_delete, name="response-delete"),
    path("flags", responses.flags, name="flags"),
    path("flags/<int:response_id>/resolve", responses.flag_resolve, name="flag-resolve"),
    path("jobs", jobs.jobs, name="jobs"),
    path("jobs/<int:job_id>/stop", jobs.job_stop, name="job-stop"),
    path("export", exporting.export, name="export"),
    path("export/download", exporting.download, name="download"),
    path("audit", audit_pages.audit_page, name="audit"),
]

urlpatterns = [
    path("", projects.home, name="home"),
    path("projects/new", projects.project_new, name="project-new"),
    path("audit", audit_pages.site_audit, name="site-audit"),
    path("p/<slug:slug>/", include(_project)),
]
