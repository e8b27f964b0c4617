"""What the axes of an attention call mean, and how its queries and keys are seen."""

from typing import TYPE_CHECKING

from cameo.lazy import load_on_use

if TYPE_CHECKING:
    from cameo.attention.capture import AttentionCapture, AttentionLayer
    from cameo.attention.kernel_inputs import KernelInputs
    from cameo.attention.layout import TokenLayout
else:
    __getattr__, __dir__ = load_on_use(
        __name__,
        {
            "AttentionCapture": "cameo.attention.capture",
            "AttentionLayer": "cameo.attention.capture",
            "KernelInputs": "cameo.attention.kernel_inputs",
            "TokenLayout": "cameo.attention.layout",
        },
    )

__all__ = [
    "AttentionCapture",
    "AttentionLayer",
    "KernelInputs",
    "TokenLayout",
]
