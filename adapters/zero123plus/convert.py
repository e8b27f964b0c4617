"""From the published form of Zero123++'s U-Net to ours; the weights are the same in both.

Back it needs nothing: a `ReferenceUNet` is saved as the plain U-Net of diffusers that the published pipeline loads.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import nn

from cameo.adapters.zero123plus.layers import is_published, make_reference_attention

__all__ = ["keep_references"]


def keep_references(model: nn.Module) -> nn.Module:
    """Let a published `RefOnlyNoisedUNet` be trained with gradient checkpointing, in place.

    Its attentions become `ReferenceAttention`s, which keep the references for the recomputation; the kernels, the
    weights and the output stay. Takes the wrapper or the U-Net in it.

    Raises:
        ValueError: if there is no published processor to replace.
    """
    published = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Attention) and is_published(module.processor)
    }
    if not published:
        raise ValueError(
            f"model: {type(model).__name__} holds no reference-only processors of the published pipeline "
            "(RefOnlyNoisedUNet, pipeline.unet after pipeline.prepare())"
        )
    for path, attention in published.items():
        processor = attention.processor
        make_reference_attention(attention, processor.name or path, reads=processor.enabled)
    return model
