"""Do cameras, depth and images that a user hands over fit together?"""

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.inspection.check import check_views
    from cameo.inspection.report import DataCheck, PairCheck
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "DataCheck": "cameo.inspection.report",
            "PairCheck": "cameo.inspection.report",
            "check_views": "cameo.inspection.check",
        },
    )

__all__ = ["DataCheck", "PairCheck", "check_views"]
