"""Adapter for MVDream and ImageDream: our own form, the original ldm code, and its diffusers port."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from cameo.adapters.common.joint_views import latent_stride_of
from cameo.adapters.common.positions import get_position, set_position
from cameo.adapters.common.presets import preset_values, unet_2d
from cameo.adapters.common.unet_layers import default_layer_index, self_attentions
from cameo.adapters.mvdream.cameras import CAMERA_CHANNELS
from cameo.adapters.mvdream.layers import (
    attends_to_text,
    checkpointed_blocks,
    context_channels,
    embeds_cameras,
    find_attentions,
    find_levels,
    has_image_view,
    joins_views,
    ldm_unet,
    token_layout,
)
from cameo.attention.capture import AttentionLayer
from cameo.attention.layout import TokenLayout
from cameo.backbone import Backbone, Release

__all__ = ["MVDream"]

LATENT_STRIDE = 8  # of the only autoencoder that the releases use

# All steps for a U-Net of one's own.
PREPARE = (
    "Before cameo.wrap: from cameo.adapters.mvdream.denoiser import prepare; prepare(unet, image_view=False, "
    "latent_stride=8), with image_view=True for ImageDream. In each forward: "
    "cross_attention_kwargs={'num_views': V}. An MVDreamPipeline does both"
)

TINY = {"block_out_channels": (32, 64), "attention_levels": (False, True), "position": "sincos"}
SMALL = {
    "image_size": 128,
    "block_out_channels": (128, 256, 384),
    "attention_levels": (False, True, True),
    "heads": 8,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "position": "sincos",
}


class MVDream(Backbone):
    """Views of one object, joined in every self-attention, with one camera vector per view.

    Attaches to `MultiViewUNetModel` of the MVDream and ImageDream releases and of the diffusers port, and to the
    `UNet2DConditionModel` of an `MVDreamPipeline`. Presets: `tiny` (pixel space, 64 px, CPU) and `small` (128 px, one
    GPU) are conditioned by a text, `imagedream-tiny` and `imagedream-small` by an image. They predict the noise, as the
    releases do. Where the clean image that one prediction stands for is judged, `prediction_type="v_prediction"` is the
    better choice: read out of a predicted noise, errors are amplified by the share of noise over that of signal, 11
    times at noise level 0.95 and 15 times at 1.

    Of ImageDream the last view of the attention is the image prompt, the first view of a correspondence. Its matches
    are supervised like those of any other view, in both directions; it has no denoising loss, as published. The variant
    "ipmv-local" has the image tokens alone and no such view; the models have the same layers, so call
    `set_image_view(unet, False)` before `cameo.wrap`.
    """

    name = "mvdream"
    pipeline_tag = "text-to-3d"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"condition": "text", **TINY},
        "small": {"condition": "text", **SMALL},
        "imagedream-tiny": {"condition": "image", **TINY},
        "imagedream-small": {"condition": "image", **SMALL},
    }
    preset_license = "apache-2.0"
    released: ClassVar[Mapping[str, Release]] = {
        "bundled:mvdream-tiny": Release(
            "apache-2.0", holds="`imagedream-tiny`, small, that knows views a few degrees apart"
        ),
        "ashawkey/mvdream-sd2.1-diffusers": Release(
            "openrail", holds="MVDream on Stable Diffusion 2.1, diffusers layout"
        ),
        "ashawkey/imagedream-ipmv-diffusers": Release(
            "openrail", holds="ImageDream with pixel controller, diffusers layout"
        ),
        "MVDream/MVDream": Release(
            "openrail",
            revision="d14ac9d78c48c266005729f2d5633f6c265da467",
            holds="MVDream, original checkpoints",
        ),
    }

    def recognizes(self, model: nn.Module) -> bool:
        """Whether the self-attentions join the views and the model embeds 16 numbers of camera per view."""
        return joins_views(model) and (ldm_unet(model) is not None or embeds_cameras(model))

    def explain_mismatch(self, model: nn.Module) -> str:
        """Name the missing camera embedding, inflation or blocks."""
        kind = type(model).__name__
        if self_attentions(model) and embeds_cameras(model):
            return f"the self-attentions of this {kind} see one view at a time. {PREPARE}"
        if self_attentions(model):
            return (
                f"this {kind} has no camera embedding (class_embed_type='projection', 16 inputs). "
                "For a U-Net with ray maps use backbone 'cat3d'"
            )
        return (
            f"{kind} has neither MVDream's blocks (input_blocks.1.1.transformer_blocks.0.attn1, in a transformer that "
            "takes num_frames) nor those of diffusers. Pass the U-Net itself: pipeline.unet, or "
            "model.model.diffusion_model of the original code"
        )

    def attention_layers(self, model: nn.Module) -> list[AttentionLayer]:
        """All self-attentions in execution order."""
        unet, levels = ldm_unet(model), find_levels(model)
        layout = token_layout(model if unet is None else unet)
        found = []
        for index, (path, attention) in enumerate(find_attentions(model).items()):
            latent_stride = LATENT_STRIDE if unet is not None else latent_stride_of(attention)
            stride = latent_stride and latent_stride * 2 ** levels[path]
            reason = attends_to_text(model, path) if unet is not None else None
            found.append(
                AttentionLayer(
                    index, path, int(attention.heads), layout, stride, unsupported=reason, stride_cure=PREPARE
                )
            )
        return found

    def default_layer(self, model: nn.Module) -> int:
        """First attention of the up block one level below full resolution (in the releases: 10 of 16)."""
        return default_layer_index(find_levels(model))

    def position(self, model: nn.Module) -> str:
        """Name the map behind the first convolution of a U-Net of diffusers, see `cameo.adapters.common.positions`."""
        return get_position(model)

    def set_position(self, model: nn.Module, position: str) -> None:
        """Add the map "sincos", or take it off with "none"."""
        set_position(model, position)

    def former_layout(self, layer: AttentionLayer) -> TokenLayout:
        """Earlier releases left the matches of the image prompt out."""
        last = layer.layout.references_last
        return TokenLayout("b (v h w)", unsupervised_views=last, references_last=last)

    def unsupported(self, model: nn.Module) -> str | None:
        """Name the blocks of the original code that would recompute themselves without a graph."""
        if not (blocks := checkpointed_blocks(model)):
            return None
        return (
            f"{len(blocks)} blocks of this {type(model).__name__} ({blocks[0]}, ...) are checkpointed by the code's "
            "own CheckpointFunction: queries and keys carry no gradient there, and its backward fails on the number of "
            "views. Call cameo.adapters.mvdream.disable_checkpointing(unet), or build the model with "
            "use_checkpoint: False, as the released settings do"
        )

    def example_inputs(self, model: nn.Module, *, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One sample of two views (three with an image prompt) with 8x8 latent cells, or enough to be halved."""
        generator = torch.Generator().manual_seed(seed)
        like = next(model.parameters())

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(like)

        original = ldm_unet(model)
        unet: Any = model if original is None else original
        views = 3 if has_image_view(unet) else 2
        timesteps = torch.full((views,), 500, device=like.device)
        cameras = normal(views, 16)
        if views == 3:
            cameras[-1] = 0
        if original is None:
            side = 2 ** max(3, len(unet.down_blocks) - 1)
            kwargs: dict[str, Any] = {"class_labels": cameras, "cross_attention_kwargs": {"num_views": views}}
            if unet.config.encoder_hid_dim_type == "ip_image_proj":
                kwargs["added_cond_kwargs"] = {"image_embeds": [normal(views, 1, 3, unet.config.encoder_hid_dim)]}
            context = torch.zeros(views, 1, unet.config.cross_attention_dim).to(like)
            return (normal(views, unet.config.in_channels, side, side), timesteps, context), kwargs
        side = 2 ** max(3, max(find_levels(model).values()))
        # The port computes in the precision of the time steps.
        args = (normal(views, unet.in_channels, side, side), timesteps, normal(views, 5, context_channels(unet)))
        kwargs = {"camera": cameras, "num_frames": views}
        if getattr(unet, "image_embed", None) is not None:
            kwargs["ip"] = normal(views, 3, unet.image_embed.proj_in.in_features)
        if views == 3:
            kwargs["ip_img"] = normal(1, unet.in_channels, side, side)
        return args, kwargs

    def build(self, preset: str = "tiny", **options: Any) -> Any:
        """Build a pipeline with fresh weights, on pixels and without encoders.

        Args:
            preset: "tiny", "small", "imagedream-tiny" or "imagedream-small".
            **options: override a preset's values: `image_size`, `patch_size`, `block_out_channels`, `attention_levels`
                (per resolution, finest first), `layers_per_block`, `heads`, `norm_num_groups`, `cross_attention_dim`,
                `prediction_type` ("epsilon", "v_prediction" or "sample"), `prompt`, `single_image_share`, `condition`,
                `position` ("sincos" or "none", see `cameo.adapters.common.positions`).
        """
        from cameo.adapters.common.noise_schedules import ddim
        from cameo.adapters.mvdream.pipeline import MVDreamPipeline

        values = preset_values(
            self,
            preset,
            options,
            image_size=64,
            patch_size=4,
            layers_per_block=1,
            heads=4,
            norm_num_groups=16,
            cross_attention_dim=8,
            prediction_type="epsilon",
            prompt="",
            single_image_share=0.0,
        )
        unet = unet_2d(
            values,
            cross_attention_dim=values["cross_attention_dim"],
            class_embed_type="projection",
            projection_class_embeddings_input_dim=CAMERA_CHANNELS,
        )
        kept = ("patch_size", "condition", "prompt", "single_image_share", "position")
        settings = {name: values[name] for name in kept}
        return MVDreamPipeline(unet, ddim(values["prediction_type"]), **settings)

    def load(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Load a saved `MVDreamPipeline`, a release in the layout of the diffusers port, or an original checkpoint.

        The port's own Python files are never run; its U-Net is converted. An original checkpoint (`.pt`) is a file, or
        named by `weights` in a folder or Hub repository; it holds no diffusers autoencoder and text encoder, so
        `stable_diffusion` names where those come from.

        Args:
            name_or_path: Hub id, folder or file, or `bundled:NAME`.
            revision: commit, tag or branch of a Hub id; default the one in `released`.
            **options: `weights` and `stable_diffusion` (see above), `num_heads` or `num_head_channels` of an original
                checkpoint that is not of the released shape, `image_encoder` (Hub id or folder of ImageDream's CLIP
                encoder, for an original checkpoint), `prompt`, `single_image_share`, `torch_dtype`.

        Raises:
            DataError: if files are missing or of another kind; says which.
        """
        from cameo.adapters.mvdream.weights import load_pipeline

        return load_pipeline(name_or_path, revision=revision or self.revision(name_or_path), **options)

    def outline(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Build what `load` would return without its weights; takes the same arguments, and downloads nothing.

        Raises:
            DataError: for a Hub id whose architecture is not known here; says how to get its settings.
        """
        from cameo.adapters.common.outlines import outline_pipeline
        from cameo.adapters.mvdream.weights import OUTLINES

        return outline_pipeline(self, name_or_path, OUTLINES, revision=revision, **options)
