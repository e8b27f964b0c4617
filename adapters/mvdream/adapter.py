"""Adapter for MVDream and ImageDream: our own form, the original ldm code, and its diffusers port."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from cameo.adapters.common.presets import preset_values, unet_2d
from cameo.adapters.common.unet_layers import default_layer_index, level_of, self_attentions
from cameo.adapters.released import licence_of, revision_of
from cameo.attention.capture import AttentionSite
from cameo.attention.layout import TokenLayout
from cameo.backbone import Backbone

__all__ = ["MVDream", "disable_checkpointing", "set_image_view"]

LDM_ATTENTION = re.compile(
    r"(?P<prefix>(?:.+\.)?)(?:(?P<part>input_blocks|output_blocks)\.(?P<block>\d+)|middle_block)\.1"
    r"\.transformer_blocks\.\d+\.attn1"
)
LATENT_STRIDE = 8  # of the only autoencoder that the releases use
# The whole way for a U-Net of one's own.
PREPARE = (
    "Before cameo.wrap: from cameo.adapters.mvdream_unet import prepare; prepare(unet, image_view=False, "
    "latent_stride=8), with image_view=True for ImageDream. In each forward: "
    "cross_attention_kwargs={'num_views': V}. An MVDreamPipeline does both"
)


class MVDream(Backbone):
    """Views of one object, joined in every self-attention, with one camera vector per view.

    Attaches to `MultiViewUNetModel` of the MVDream and ImageDream releases and of the diffusers port, and to the
    `UNet2DConditionModel` of an `MVDreamPipeline`. Presets: `tiny` (pixel space, 64 px, CPU) and `small` (128 px, one
    GPU) are conditioned by a text, `imagedream-tiny` and `imagedream-small` by an image.

    Of ImageDream the last view of the attention is the image prompt: the first view of a correspondence, without a
    loss of its own. Its variant "ipmv-local" has the image tokens alone and no such view; the models are the same, so
    say it: `set_image_view(unet, False)` before `cameo.wrap`.
    """

    name = "mvdream"
    pipeline_tag = "text-to-3d"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "tiny": {"condition": "text", "block_out_channels": (32, 64), "attention_levels": (False, True)},
        "small": {
            "condition": "text",
            "image_size": 128,
            "block_out_channels": (128, 256, 384),
            "attention_levels": (False, True, True),
            "heads": 8,
            "layers_per_block": 2,
            "norm_num_groups": 32,
        },
        "imagedream-tiny": {"condition": "image", "block_out_channels": (32, 64), "attention_levels": (False, True)},
        "imagedream-small": {
            "condition": "image",
            "image_size": 128,
            "block_out_channels": (128, 256, 384),
            "attention_levels": (False, True, True),
            "heads": 8,
            "layers_per_block": 2,
            "norm_num_groups": 32,
        },
    }

    def recognises(self, model: nn.Module) -> bool:
        """Whether the self-attentions join the views and the model embeds 16 numbers of camera per view."""
        if _ldm_attentions(model):
            return True
        from cameo.adapters.mvdream.denoiser import embeds_cameras

        attentions = self_attentions(model)
        joined = [getattr(getattr(one, "processor", None), "join", False) for one in attentions.values()]
        return bool(joined) and all(joined) and embeds_cameras(model)

    def explain_mismatch(self, model: nn.Module) -> str:
        """Name the missing camera embedding, inflation or blocks."""
        from cameo.adapters.mvdream.denoiser import embeds_cameras

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

    def sites(self, model: nn.Module) -> list[AttentionSite]:
        """All self-attentions in execution order."""
        if attentions := _ldm_attentions(model):
            levels = _ldm_levels(model, attentions)
            return [
                AttentionSite(
                    index,
                    path,
                    int(attention.heads),
                    _layout(_ldm_unet(model, path)),
                    LATENT_STRIDE * 2 ** levels[path],
                    unsupported=_text_instead_of_views(model, path),
                )
                for index, (path, attention) in enumerate(attentions.items())
            ]
        found = []
        for index, (path, attention) in enumerate(self_attentions(model).items()):
            latent_stride = getattr(attention.processor, "latent_stride", None)
            stride = latent_stride * 2 ** level_of(model, path) if latent_stride else None
            heads = int(attention.heads)
            found.append(AttentionSite(index, path, heads, _layout(model), stride, stride_cure=PREPARE))
        return found

    def default_layer(self, model: nn.Module) -> int:
        """First attention of the up block one level below full resolution (in the releases: 10 of 16)."""
        attentions = _ldm_attentions(model)
        if not attentions:
            return default_layer_index(model, self_attentions(model))
        levels = _ldm_levels(model, attentions)
        wanted = (
            index for index, path in enumerate(attentions) if levels[path] == 1 and "output_blocks" in path.split(".")
        )
        return next(wanted, len(attentions) - 1)

    def hazard(self, model: nn.Module) -> str | None:
        """Name the blocks of the original code that would recompute themselves without a graph."""
        if hasattr(model, "down_blocks") or not _ldm_attentions(model):  # diffusers checkpoints without harm
            return None
        blocks = [name for name, module in model.named_modules() if _checkpoints(module)]
        if not blocks:
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

        attentions = _ldm_attentions(model)
        unet: Any = _ldm_unet(model, next(iter(attentions))) if attentions else model
        views = 3 if _has_image_view(unet) else 2
        timesteps = torch.full((views,), 500, device=like.device)
        cameras = normal(views, 16)
        if views == 3:
            cameras[-1] = 0
        if not attentions:
            side = 2 ** max(3, len(unet.down_blocks) - 1)
            kwargs: dict[str, Any] = {"class_labels": cameras, "cross_attention_kwargs": {"num_views": views}}
            if unet.config.encoder_hid_dim_type == "ip_image_proj":
                kwargs["added_cond_kwargs"] = {"image_embeds": [normal(views, 1, 3, unet.config.encoder_hid_dim)]}
            context = torch.zeros(views, 1, unet.config.cross_attention_dim).to(like)
            return (normal(views, unet.config.in_channels, side, side), timesteps, context), kwargs
        side = 2 ** max(3, max(_ldm_levels(model, attentions).values()))
        # The port hands the time steps' precision on.
        args = (normal(views, unet.in_channels, side, side), timesteps, normal(views, 5, _context_channels(unet)))
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
                `prediction_type`, `prompt`, `single_image_share`, `condition`.
        """
        from cameo.adapters.mvdream.cameras import CAMERA_CHANNELS
        from cameo.adapters.mvdream.pipeline import MVDreamPipeline
        from cameo.adapters.mvdream.weights import noise_schedule

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
        settings = {name: values[name] for name in ("patch_size", "condition", "prompt", "single_image_share")}
        return MVDreamPipeline(unet, noise_schedule(values["prediction_type"]), **settings)

    def load(self, name_or_path: str, *, revision: str | None = None, **options: Any) -> Any:
        """Load a saved `MVDreamPipeline`, a release in the layout of the diffusers port, or an original checkpoint.

        The port's own Python files are never run; its U-Net is converted. An original checkpoint (`.pt`) is a file, or
        named by `weights` in a folder or Hub repository; it holds no diffusers autoencoder and text encoder, so
        `stable_diffusion` names where those come from.

        Args:
            name_or_path: Hub id, folder or file.
            revision: commit, tag or branch of a Hub id; default the one in `cameo.adapters.released`.
            **options: `weights` and `stable_diffusion` (see above), `num_heads` or `num_head_channels` of an original
                checkpoint that is not of the released shape, `image_encoder` (Hub id or folder of ImageDream's CLIP
                encoder, for an original checkpoint), `prompt`, `single_image_share`, `torch_dtype`.

        Raises:
            DataError: if files are missing or of another kind; says which.
        """
        from cameo.adapters.mvdream.weights import load_pipeline

        return load_pipeline(name_or_path, revision=revision or revision_of(name_or_path), **options)

    def licence(self, name_or_path: str | None) -> str | Mapping[str, str] | None:
        """Licence of presets and of the releases listed in `cameo.adapters.released`."""
        return licence_of(name_or_path)

    def revision(self, name_or_path: str | None) -> str | None:
        """Revision of the releases listed in `cameo.adapters.released`."""
        return revision_of(name_or_path)


def set_image_view(unet: nn.Module, present: bool) -> nn.Module:
    """Say whether the last view of an ImageDream U-Net's attention is the image prompt, in place; returns the U-Net.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> adapter = get_backbone("mvdream")
        >>> unet = adapter.build("imagedream-tiny").unet
        >>> adapter.sites(unet)[0].layout.references_last
        1
        >>> adapter.sites(set_image_view(unet, False))[0].layout
        TokenLayout("b (v h w)")

    Only the model's caller knows: the original code takes the image as the argument `ip_img`, and the variant
    "ipmv-local", which is called without it, has the same layers. Say it before `cameo.wrap`, and again for a base
    model that is loaded anew.
    """
    attentions = _ldm_attentions(unet)
    inner: Any = _ldm_unet(unet, next(iter(attentions))) if attentions else unet
    inner.image_view = present
    return unet


def disable_checkpointing(model: nn.Module) -> nn.Module:
    """Switch the original code's gradient checkpointing off, in place; returns the same model.

    Example:
        >>> block = nn.Module()
        >>> block.use_checkpoint = True
        >>> disable_checkpointing(block).use_checkpoint
        False
    """
    for module in model.modules():
        for name in ("checkpoint", "use_checkpoint"):
            if getattr(module, name, None) is True:
                setattr(module, name, False)
    return model


def _layout(unet: nn.Module) -> TokenLayout:
    if _has_image_view(unet):
        return TokenLayout("b (v h w)", unsupervised_views=1, references_last=1)
    return TokenLayout("b (v h w)")


def _has_image_view(unet: nn.Module) -> bool:
    said = getattr(unet, "image_view", None)
    return getattr(unet, "image_embed", None) is not None if said is None else bool(said)


def _ldm_attentions(model: nn.Module) -> dict[str, Any]:
    """Self-attentions of the original code; they are registered in execution order."""
    return {
        path: module
        for path, module in model.named_modules()
        if LDM_ATTENTION.fullmatch(path)
        and all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "heads"))
        and _takes_views(model.get_submodule(path.rpartition(".")[0]))
    }


def _takes_views(block: nn.Module) -> bool:
    """Whether a transformer block is three-dimensional: it is told the number of views and joins them itself."""
    return "num_frames" in inspect.signature(type(block).forward).parameters


def _ldm_unet(model: nn.Module, path: str) -> nn.Module:
    match = LDM_ATTENTION.fullmatch(path)
    assert match is not None
    return model.get_submodule(match["prefix"].rstrip("."))


def _ldm_levels(model: nn.Module, attentions: Mapping[str, nn.Module]) -> dict[str, int]:
    """How often the latents were halved at each attention."""
    unet: Any = _ldm_unet(model, next(iter(attentions)))
    resampled = {
        part: [any(type(module).__name__ == kind for module in block.modules()) for block in getattr(unet, part)]
        for part, kind in (("input_blocks", "Downsample"), ("output_blocks", "Upsample"))
    }
    coarsest, levels = sum(resampled["input_blocks"]), {}
    for path in attentions:
        match = LDM_ATTENTION.fullmatch(path)
        assert match is not None
        part, block = match["part"], int(match["block"] or 0)
        before = sum(resampled[part][:block]) if part else 0
        levels[path] = before if part == "input_blocks" else coarsest - before
    return levels


def _text_instead_of_views(model: nn.Module, path: str) -> str | None:
    block = model.get_submodule(path.rpartition(".")[0])
    if getattr(block, "disable_self_attn", False):
        return "its self-attention is disabled, so it attends to the text"
    return None


def _context_channels(unet: nn.Module) -> int:
    path = next(name for name, _ in unet.named_modules() if name.endswith("attn2.to_k"))
    return int(unet.get_submodule(path).in_features)  # type: ignore[arg-type]


def _checkpoints(module: nn.Module) -> bool:
    """Whether a block of the original code runs through its `CheckpointFunction`; the U-Net's own flag does nothing."""
    in_attention = getattr(module, "checkpoint", None) is True and hasattr(module, "attn1")
    return in_attention or (getattr(module, "use_checkpoint", None) is True and hasattr(module, "emb_layers"))
