"""MVDream's denoiser: diffusers' U-Net with joint attention, a camera embedding and ImageDream's image tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import (
    ModelMixin,  # noqa: F401 - diffusers looks a component's base class up in the component's own module
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.embeddings import (
    IPAdapterPlusImageProjection,
    MultiIPAdapterImageProjection,
    TimestepEmbedding,
)
from torch import Tensor

from cameo.adapters.common.diffusers_attention import XFormersOnCudaAttnProcessor, turn_into
from cameo.adapters.common.joint_views import JointAttention, inflate, make_joint
from cameo.adapters.mvdream.cameras import CAMERA_CHANNELS
from cameo.adapters.mvdream.layers import embeds_cameras

__all__ = ["CameraEmbedding", "ImageDreamUNet", "ImageTokenAttention", "prepare"]

# What diffusers' switches set in an attention with image tokens.
KERNELS = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XFormersOnCudaAttnProcessor,
)


class CameraEmbedding(TimestepEmbedding):
    """Camera vectors `[(B V), 16]` to what is added to the time embedding; a row of NaN adds exactly zero.

    The rows of NaN are images without a camera: the original leaves the camera out for a whole batch, diffusers asks
    for class labels in every call. The parameters are those of `TimestepEmbedding`.

    Example:
        >>> embedding = CameraEmbedding(16, 8)
        >>> cameras = torch.cat([torch.ones(1, 16), torch.full((1, 16), float("nan"))])
        >>> embedding(cameras).any(dim=1).tolist()
        [True, False]
    """

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embed the cameras that are there."""
        absent = sample.isnan().any(dim=-1, keepdim=True)
        return super().forward(sample.masked_fill(absent, 0), condition).masked_fill(absent, 0)

    @classmethod
    def around(cls, embedding: TimestepEmbedding) -> CameraEmbedding:
        """Take over the very layers of `embedding`, with whatever LoRA or hooks they carry."""
        with torch.device("meta"):
            taken = cls(1, 1)
        taken.linear_1, taken.act, taken.linear_2 = embedding.linear_1, embedding.act, embedding.linear_2
        return taken.train(embedding.training)


class ImageTokenAttnProcessor(IPAdapterAttnProcessor2_0):
    """Cross-attention to the text and, with keys and values of its own, to the image tokens; one view at a time."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        num_views: int = 1,
    ) -> Tensor:
        """Attend as diffusers' processor does; `num_views` is for the self-attentions."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class ImageTokenAttention(JointAttention):
    """Cross-attention whose processor is an `ImageTokenAttnProcessor` for good, since that holds weights of the model.

    The switches of diffusers for kernels leave it as it is, with PyTorch's kernel; another processor is refused.
    """

    def set_processor(self, processor: Any) -> None:
        """Take an `ImageTokenAttnProcessor`, and keep it where only a kernel is asked for.

        Raises:
            ValueError: for a processor that is no kernel of diffusers, without which the image tokens would be lost.
        """
        if isinstance(processor, ImageTokenAttnProcessor):
            super().set_processor(processor)
        elif type(processor) not in KERNELS:
            raise ValueError(
                f"processor: expected an ImageTokenAttnProcessor, got {type(processor).__name__}, which attends to no "
                "image tokens, and whose predecessor holds their keys and values. Give another processor to the "
                "self-attentions alone: unet.set_attn_processor({**unet.attn_processors, name: processor})"
            )


class ImageDreamUNet(UNet2DConditionModel):
    """`UNet2DConditionModel` with ImageDream's image tokens, that is with an IP-Adapter Plus of its own.

    diffusers adds an IP-Adapter to a model that exists; here it is part of the model, so that it is saved, loaded and
    trained with it. Arguments are those of `UNet2DConditionModel`, with `encoder_hid_dim_type="ip_image_proj"` and
    `encoder_hid_dim` the width of the image encoder's tokens.
    """

    NUM_TOKENS = 16

    @functools.wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]  # the signature is read
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        context = self.config.cross_attention_dim
        for path in [name.removesuffix(".processor") for name in self.attn_processors]:
            if path.endswith("attn2"):
                attention = self.get_submodule(path)
                turn_into(ImageTokenAttention, {path: attention})
                processor = ImageTokenAttnProcessor(attention.inner_dim, context, num_tokens=(self.NUM_TOKENS,))
                make_joint(attention, join=False).set_processor(processor)

    def _set_encoder_hid_proj(
        self, encoder_hid_dim_type: str | None, cross_attention_dim: int, encoder_hid_dim: int | None
    ) -> None:
        if encoder_hid_dim_type != "ip_image_proj" or encoder_hid_dim is None:
            raise ValueError(
                "ImageDreamUNet: expected encoder_hid_dim_type='ip_image_proj' and encoder_hid_dim=, got "
                f"{encoder_hid_dim_type!r} and {encoder_hid_dim!r}"
            )
        resampler = IPAdapterPlusImageProjection(
            embed_dims=encoder_hid_dim,
            output_dims=cross_attention_dim,
            hidden_dims=cross_attention_dim,
            depth=4,
            dim_head=64,
            heads=12,
            num_queries=self.NUM_TOKENS,
        )
        self.encoder_hid_proj = MultiIPAdapterImageProjection([resampler])


def prepare(
    unet: UNet2DConditionModel, *, image_view: bool, use_xformers: bool = False, latent_stride: int | None = None
) -> UNet2DConditionModel:
    """Join the views in the self-attentions and let cameras be absent, in place; the weights stay as they are.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("mvdream").build("tiny").unet
        >>> prepare(unet, image_view=False).class_embedding.__class__.__name__
        'CameraEmbedding'

    Args:
        unet: its class embedding takes 16 numbers.
        image_view: whether the last view of the attention is ImageDream's image prompt.
        use_xformers, latent_stride: see `cameo.adapters.common.joint_views.inflate`.

    Raises:
        ValueError: if the U-Net has no camera embedding.
    """
    if not embeds_cameras(unet):
        raise ValueError(
            "unet: has no camera embedding; expected a UNet2DConditionModel with class_embed_type='projection' and "
            f"projection_class_embeddings_input_dim={CAMERA_CHANNELS}"
        )
    if not isinstance(unet.class_embedding, CameraEmbedding):
        unet.class_embedding = CameraEmbedding.around(unet.class_embedding)
    inflate(unet, use_xformers=use_xformers, latent_stride=latent_stride)
    unet.image_view = image_view
    return unet
