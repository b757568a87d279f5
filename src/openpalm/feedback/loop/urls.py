"""URLs of the loop: the circle, trainings, models, comparisons, promotion, quality, the board."""

from django.urls import path

from openpalm.feedback.loop import comparing, model_pages, overview, quality, training

urlpatterns = [
    path("loop", overview.loop, name="loop"),
    path("loop/next-batch", overview.next_batch, name="next-batch"),
    path("runs", training.run_list, name="runs"),
    path("runs/new", training.train, name="train"),
    path("runs/<int:run_id>", training.run, name="run"),
    path("runs/<int:run_id>/stop", training.run_stop, name="run-stop"),
    path("runs/<int:run_id>/resume", training.run_resume, name="run-resume"),
    path("models", model_pages.models, name="models"),
    path("models/new", model_pages.model_new, name="model-new"),
    path("models/<int:model_id>", model_pages.model, name="model"),
    path("models/<int:model_id>/choose", model_pages.model_choose, name="model-choose"),
    path("models/<int:model_id>/score", model_pages.model_score, name="model-score"),
    path("models/<int:model_id>/compare", comparing.compare, name="compare"),
    path("models/<int:model_id>/promote", comparing.promote, name="promote"),
    path("snapshots/<int:snapshot_id>", model_pages.snapshot, name="snapshot"),
    path("comparisons", comparing.comparison_list, name="comparisons"),
    path("comparisons/<int:comparison_id>", comparing.comparison, name="comparison"),
    path("comparisons/<int:comparison_id>/extend", comparing.extend, name="extend"),
    path("promotions/<int:promotion_id>/undo", comparing.promotion_undo, name="promotion-undo"),
    path("quality", quality.quality, name="quality"),
    path("board", quality.board, name="board"),
]
