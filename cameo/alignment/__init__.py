"""The alignment loss: its definition, its readable reference, and its fast forms."""

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.alignment.head import AlignmentHead, check_head_options
    from cameo.alignment.loss import alignment_loss
    from cameo.alignment.supervision import check_options, supervision_weights
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "AlignmentHead": "cameo.alignment.head",
            "alignment_loss": "cameo.alignment.loss",
            "check_head_options": "cameo.alignment.head",
            "check_options": "cameo.alignment.supervision",
            "supervision_weights": "cameo.alignment.supervision",
        },
    )

__all__ = [
    "AlignmentHead",
    "alignment_loss",
    "check_head_options",
    "check_options",
    "supervision_weights",
]
