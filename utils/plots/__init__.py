"""Every figure of the series, and the way figures are kept: as PNG, with alternative text.

Functions take plain arrays and tables and return a matplotlib Figure made without pyplot, so that
none is left open. Palettes are ones that colour-blind readers tell apart (cividis, seaborn's
"colorblind"), and models differ by marker as well as by colour. Values and intervals are fractions
unless said otherwise; columns `low` and `high` are the ends of a 95 % interval and may be missing
(NaN). `note` stands behind the title: "synthetic" wherever drawn phantoms are shown.
"""

from __future__ import annotations

from utils.plots.images import (
    attention_map,
    augmented_views,
    contact_sheet,
    error_gallery,
    explanation_page,
    gallery,
    scales_on_image,
    soft_targets,
    softmax_of_softmax,
)
from utils.plots.page import (
    save,
    show,
    tabulate,
)
from utils.plots.report import (
    confusion_matrices,
    coverage,
    deletion,
    differences,
    exports,
    leak_gaps,
    metric_intervals,
    recall_intervals,
    reliability,
    target_bar,
)
from utils.plots.training import (
    class_counts,
    frozen_map,
    images_per_patient,
    learning_curves,
    ratios,
    schedule,
    series_overview,
)

__all__ = [
    "attention_map", "augmented_views", "class_counts", "confusion_matrices",
    "contact_sheet", "coverage", "deletion", "differences", "error_gallery", "explanation_page",
    "exports", "frozen_map", "gallery", "images_per_patient", "leak_gaps", "learning_curves",
    "metric_intervals", "ratios", "recall_intervals", "reliability", "save", "scales_on_image",
    "schedule", "series_overview", "show", "soft_targets", "softmax_of_softmax", "tabulate",
    "target_bar",
]  # fmt: skip
