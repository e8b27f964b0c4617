"""From the published form of Zero123++'s U-Net to ours; the weights are the same in both.

Back it needs nothing: a `ReferenceUNet` is saved as the plain U-Net of diffusers that the published pipeline loads.
"""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import nn

from cameo.adapters.zero123plus.layers import ReferenceAttnProcessor, is_published

__all__ = ["keep_references"]


def keep_references(model: nn.Module) -> nn.Module:
    """Let a published `RefOnlyNoisedUNet` be trained with gradient checkpointing, in place.

    Its attention processors are replaced by `ReferenceAttnProcessor`, which keeps the references for the
    recomputation; the kernels, the weights and the output stay. Takes the wrapper or the U-Net in it.

    Raises:
        ValueError: if there is no published processor to replace.
    """
    processors = {
        path: module.processor
        for path, module in model.named_modules()
        if isinstance(module, Attention) and is_published(module.processor)
    }
    if not processors:
        raise ValueError(
            f"model: {type(model).__name__} holds no reference-only processors of the published pipeline "
            "(RefOnlyNoisedUNet, pipeline.unet after pipeline.prepare())"
        )
    for path, processor in processors.items():
        ours = ReferenceAttnProcessor(processor.name or path, reads=processor.enabled, kernel=processor.chained_proc)
        model.get_submodule(path).set_processor(ours)  # type: ignore[operator]
    return model
