"""The denoisers of CAT3D-style models: diffusers' U-Net unchanged, or a diffusion transformer, which this file defines.

The transformer is diffusers' DiT without its classes; its self-attentions can join the views of a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,  # noqa: F401 - diffusers asks the module of a pipeline's component for the base class it loads by
)
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import Tensor, nn

from cameo.errors import ShapeError

__all__ = ["JointDiT", "dit_attentions", "joint_dit"]


class JointDiT(DiTTransformer2DModel, PeftAdapterMixin):
    """`DiTTransformer2DModel` for pictures of any aspect, without class labels, and with LoRA.

    Weights and config are those of the base class. `inflate` joins its views as it does those of a U-Net.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> dit = get_backbone("cat3d").build("transformer-tiny").unet
        >>> sample = torch.zeros(4, dit.config.in_channels, 8, 6)  # two samples of two views
        >>> dit(sample, torch.tensor(500), cross_attention_kwargs={"num_views": 2}).sample.shape
        torch.Size([4, 48, 8, 6])

    Source: Scalable Diffusion Models with Transformers, arXiv 2212.09748.
    """

    _repeated_blocks = ("BasicTransformerBlock",)  # what `compile_repeated_blocks` compiles

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Attention processors by name, as those of diffusers' U-Nets."""
        return {f"{path}.processor": attention.processor for path, attention in dit_attentions(self).items()}

    def set_attn_processor(self, processor: Any) -> None:
        """Set one processor everywhere, or one by name in every layer.

        Raises:
            ValueError: if the names are not those of `attn_processors`.
        """
        known = self.attn_processors
        given = processor if isinstance(processor, dict) else dict.fromkeys(known, processor)
        if given.keys() != known.keys():
            raise ValueError(f"processor: expected one for each of {list(known)}, got {list(given)}")
        for name, one in given.items():
            self.get_submodule(name.removesuffix(".processor")).set_processor(one)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | int,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Denoise.

        Args:
            sample: `[B V, C, h, w]`, h and w multiples of `patch_size`.
            timestep: noise levels `[B V]`, or one for all, 0 to the last of the schedule.
            cross_attention_kwargs: passed to the attention processors.
            return_dict: return an object with `sample` instead of a tuple.

        Returns:
            An object whose `sample` is `[B V, out_channels, h, w]`, or the tensor alone in a tuple.

        Raises:
            ShapeError: if h or w does not divide into patches.
        """
        patch = self.config.patch_size
        if sample.shape[-2] % patch or sample.shape[-1] % patch:
            raise ShapeError("sample", expected=f"height and width divisible by {patch}", got=sample.shape)
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        # The base class drops labels at random while training, to the one past the last; here all are that one. So it
        # still draws random numbers, and the embeddings of its classes are never read.
        labels = torch.full_like(timestep, self.config.num_embeds_ada_norm, dtype=torch.long)
        tokens = self.pos_embed(sample)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(
                    block, tokens, None, None, None, timestep, cross_attention_kwargs, labels
                )
            else:
                tokens = block(
                    tokens, timestep=timestep, cross_attention_kwargs=cross_attention_kwargs, class_labels=labels
                )
        embedded = self.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=tokens.dtype)
        shift, scale = self.proj_out_1(nn.functional.silu(embedded))[:, None].chunk(2, dim=-1)
        tokens = self.proj_out_2(self.norm_out(tokens) * (1 + scale) + shift)
        rows = sample.shape[-2] // patch
        output = rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=patch, q=patch)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def dit_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """List the self-attentions of a `JointDiT` by path, in execution order; empty for another model.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> list(dit_attentions(get_backbone("cat3d").build("transformer-tiny").unet))[0]
        'transformer_blocks.0.attn1'
    """
    if not isinstance(model, JointDiT):
        return {}
    return {f"transformer_blocks.{index}.attn1": block.attn1 for index, block in enumerate(model.transformer_blocks)}


def joint_dit(values: Mapping[str, Any], in_channels: int) -> JointDiT:
    """Build the transformer of a preset in pixel space; its first prediction is zero, as in DiT.

    Raises:
        ValueError: if the width does not divide into the heads, the image into patches, or there is no block.
    """
    if values["blocks"] < 1:
        raise ValueError(f"blocks: expected at least 1, got {values['blocks']}")
    if values["image_size"] % values["patch_size"]:
        raise ValueError(
            f"image_size: expected a multiple of patch_size={values['patch_size']}, got {values['image_size']}"
        )
    if values["width"] % values["heads"]:
        raise ValueError(f"heads: expected a divisor of the width {values['width']}, got {values['heads']}")
    model = JointDiT(
        num_attention_heads=values["heads"],
        attention_head_dim=values["width"] // values["heads"],
        in_channels=in_channels,
        out_channels=3 * values["patch_size"] ** 2,
        num_layers=values["blocks"],
        sample_size=values["image_size"] // values["patch_size"],
        patch_size=1,  # the pixels of a patch are folded into the channels already
        num_embeds_ada_norm=1,
    )
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model
