"""The denoiser of Zero123++: a U-Net that runs twice, first over the reference image, then over the canvas.

In the first (write) pass every self-attention stores its input tokens; in the second (read) pass it appends them to
its keys and values. Source: Zero123++, arXiv 2310.15110, section 2.2, and its published pipeline.

Axes: B samples, C latent channels, h w latent cells of one view; the canvas is [B, C, 3h, 2w], six views in three rows
of two. The reference has a grid of its own.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn

from cameo.adapters.common.unet_layers import self_attentions
from cameo.errors import ShapeError

__all__ = [
    "RELEASED_REFERENCE_SIZE",
    "ReferenceAttnProcessor",
    "ReferenceUNet",
    "check_references",
    "keep_references",
    "noise_schedule",
    "set_reference_processors",
]

RELEASED_REFERENCE_SIZE = (512, 512)  # height and width in pixels at which the releases encode the reference image
_CURE = "cameo.adapters.zero123plus.denoiser.set_reference_processors(unet)"


class ReferenceAttnProcessor:
    """Attention processor that stores its tokens (`mode="w"`) or reads the stored ones (`mode="r"`).

    The published processor removes a reference when it reads it, so that the recomputation under gradient
    checkpointing finds none. This one leaves it there, which makes checkpointed gradients exact.

    Args:
        name: key of this layer in `ref_dict`.
        reads: False for text cross-attention, which takes the arguments and ignores them.
        kernel: processor that attends; default PyTorch's scaled dot-product attention.
        use_xformers: attend by xformers on CUDA; it has no CPU kernel.
        latent_stride: image pixels per latent cell, to tell the token grid for an image size.
        reference_size: height and width in pixels at which the reference image is encoded.
    """

    def __init__(
        self,
        name: str,
        *,
        reads: bool,
        kernel: Any = None,
        use_xformers: bool = False,
        latent_stride: int = 8,
        reference_size: tuple[int, int] = RELEASED_REFERENCE_SIZE,
    ) -> None:
        self.name, self.reads = name, reads
        self.latent_stride, self.reference_size = latent_stride, reference_size
        self._kernel = AttnProcessor2_0() if kernel is None else kernel
        self._cuda_kernel = XFormersAttnProcessor() if use_xformers else None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mode: str | None = None,
        ref_dict: dict[str, Tensor] | None = None,
        is_cfg_guidance: bool = False,
    ) -> Tensor:
        """Attend; `mode` and `ref_dict` come from `cross_attention_kwargs`."""
        kernel = self._cuda_kernel if self._cuda_kernel is not None and hidden_states.is_cuda else self._kernel
        if not self.reads:
            return kernel(attn, hidden_states, encoder_hidden_states, attention_mask)
        if is_cfg_guidance:
            raise ValueError("is_cfg_guidance: expected False, as in the published pipeline; double the batch instead")
        tokens = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if ref_dict is None or mode not in ("w", "r"):
            raise ValueError(
                f"cross_attention_kwargs: expected mode 'w' or 'r' and a ref_dict, got mode={mode!r}. Run the U-Net "
                "over the reference with mode='w', then over the canvas with mode='r' and the same ref_dict"
            )
        if mode == "w":
            ref_dict[self.name] = tokens
        elif self.name not in ref_dict:
            raise ValueError(
                f"cross_attention_kwargs['ref_dict']: holds no reference for {self.name}; run the U-Net over the "
                "reference image with mode='w' first"
            )
        else:
            tokens = torch.cat([tokens, ref_dict[self.name]], dim=1)
        return kernel(attn, hidden_states, tokens, attention_mask)


def set_reference_processors(
    unet: UNet2DConditionModel,
    *,
    latent_stride: int = 8,
    reference_size: tuple[int, int] = RELEASED_REFERENCE_SIZE,
    use_xformers: bool = False,
) -> UNet2DConditionModel:
    """Let the self-attentions of `unet` store and read references, in place; the weights stay as they are.

    The caller then runs both passes; `ReferenceUNet` does it by itself.

    Example:
        >>> unet = UNet2DConditionModel(
        ...     sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        ...     down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        ...     cross_attention_dim=8, attention_head_dim=4)
        >>> context, references = torch.zeros(1, 1, 8), {}
        >>> writing, reading = ({"mode": mode, "ref_dict": references} for mode in "wr")
        >>> _ = set_reference_processors(unet)(torch.zeros(1, 4, 8, 8), 0, context, cross_attention_kwargs=writing)
        >>> unet(torch.zeros(1, 4, 12, 8), 0, context, cross_attention_kwargs=reading).sample.shape
        torch.Size([1, 4, 12, 8])
    """
    unet.set_attn_processor(
        {
            name: ReferenceAttnProcessor(
                name,
                reads=name.endswith("attn1.processor"),
                use_xformers=use_xformers,
                latent_stride=latent_stride,
                reference_size=reference_size,
            )
            for name in unet.attn_processors
        }
    )
    return unet


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


def is_published(processor: Any) -> bool:
    """Whether this is a reference-only attention processor of the published pipeline, by its structure."""
    return hasattr(processor, "chained_proc") and hasattr(processor, "enabled")


def reads_references(processor: Any) -> bool:
    """Whether this processor, ours or published, appends references to its keys."""
    return (isinstance(processor, ReferenceAttnProcessor) and processor.reads) or (
        is_published(processor) and bool(processor.enabled)
    )


def check_references(unet: nn.Module) -> None:
    """Refuse a U-Net whose self-attentions do not read references any more.

    Raises:
        RuntimeError: names the layer and the cure. diffusers' switches for xformers, attention slicing and the like
            replace the attention processors, and with them the sight of the reference.
    """
    for path, module in self_attentions(unet).items():
        processor = getattr(module, "processor", None)
        if not reads_references(processor):
            raise RuntimeError(
                f"the self-attention {path} sees no reference: its processor is {type(processor).__name__}, set after "
                f"the pipeline was built. Call {_CURE} to bring the references back"
            )


def noise_schedule() -> DDPMScheduler:
    """Noise levels of the releases: v-prediction, linear betas, no zero terminal SNR.

    Example:
        >>> round(float(noise_schedule().alphas_cumprod[-1]), 5)
        0.00158
    """
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="v_prediction",
    )


class ReferenceUNet(UNet2DConditionModel):
    """`UNet2DConditionModel` that noises the reference and runs the write and the read pass in one forward.

    It is called as the published `RefOnlyNoisedUNet`, but it *is* the U-Net: same parameter names, and it is saved
    as a plain `UNet2DConditionModel`. The published wrapper takes the noise level from the training schedule in
    training and from the sampler otherwise. Both are the same level, so this class does not look at its mode.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> unet = get_backbone("zero123plus").build("tiny").unet
        >>> canvas, context = torch.zeros(1, 48, 24, 16), torch.zeros(1, 1, 8)
        >>> given = {"cond_lat": torch.zeros(1, 48, 12, 12)}
        >>> unet(canvas, torch.tensor([500]), context, cross_attention_kwargs=given).sample.shape
        torch.Size([1, 48, 24, 16])

    Attributes:
        noise_scheduler: noise levels of the reference; None is `noise_schedule()`.
    """

    noise_scheduler: DDPMScheduler | None = None

    @classmethod
    def from_unet(
        cls, unet: UNet2DConditionModel, *, noise_scheduler: DDPMScheduler | None = None, **options: Any
    ) -> ReferenceUNet:
        """Turn a U-Net into a `ReferenceUNet`, in place: the very same module, with the same weights.

        Args:
            unet: a plain `UNet2DConditionModel`, or a `ReferenceUNet`, which gets the new settings.
            noise_scheduler: noise levels of the reference; default those of the releases.
            **options: of `set_reference_processors`.

        Raises:
            TypeError: for another class, such as the published wrapper; pass the U-Net in it.
        """
        if type(unet) not in (UNet2DConditionModel, cls):
            inner = getattr(unet, "unet", None)
            cure = "; pass its .unet" if isinstance(inner, UNet2DConditionModel) else ""
            raise TypeError(f"unet: expected a UNet2DConditionModel, got {type(unet).__name__}{cure}")
        set_reference_processors(unet, **options)
        unet.__class__ = cls
        unet.noise_scheduler = noise_scheduler
        return unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        *,
        cross_attention_kwargs: dict[str, Any],
        down_block_res_samples: Any = None,
        mid_block_res_sample: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Denoise a canvas in sight of a reference.

        Args:
            sample: noisy canvas `[B, C, 3h, 2w]`.
            timestep: one for all or `[B]`; samplers that step between the levels give fractions.
            encoder_hidden_states: context `[B, T, D]` of the text cross-attention.
            class_labels: as `UNet2DConditionModel`.
            cross_attention_kwargs: `cond_lat`, clean reference latents `[B, C, h', w']`; `cond_noise`, the noise on
                them, default drawn anew in each forward; further entries go to both passes.
            down_block_res_samples, mid_block_res_sample: residuals of a ControlNet, added in the read pass.
            **options: as `UNet2DConditionModel`, given to both passes.

        Raises:
            ValueError: if `cond_lat` is missing or does not fit.
            RuntimeError: if the attention processors were replaced.
        """
        given = dict(cross_attention_kwargs)
        reference = given.pop("cond_lat", None)
        noise = given.pop("cond_noise", None)
        if reference is None:
            raise ValueError("cross_attention_kwargs['cond_lat']: expected the latents of the reference, got none")
        expected = (sample.shape[0], sample.shape[1])
        if reference.ndim != 4 or reference.shape[:2] != expected:
            raise ShapeError(
                "cross_attention_kwargs['cond_lat']",
                expected=f"[{expected[0]}, {expected[1]}, h, w]",
                got=reference.shape,
            )
        noise = torch.randn_like(reference) if noise is None else noise
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(sample.shape[0])
        references: dict[str, Tensor] = {}
        super().forward(
            self.noised(reference, noise, timesteps),
            timestep,
            encoder_hidden_states,
            class_labels,
            cross_attention_kwargs={**given, "mode": "w", "ref_dict": references},
            **options,
        )
        if not references:
            raise RuntimeError(
                "no self-attention stored its reference: the attention processors were replaced. Call "
                f"{_CURE} to bring them back"
            )
        down, mid = down_block_res_samples, mid_block_res_sample
        return super().forward(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels,
            cross_attention_kwargs={**given, "mode": "r", "ref_dict": references},
            down_block_additional_residuals=None if down is None else [one.to(self.dtype) for one in down],
            mid_block_additional_residual=None if mid is None else mid.to(self.dtype),
            **options,
        )

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` at time steps `[B]`; between the levels, linear in sigma as Euler samplers are."""
        if self.noise_scheduler is None:
            self.noise_scheduler = noise_schedule()
        scheduler = self.noise_scheduler
        if not timesteps.is_floating_point():
            # Half precision would round the small noise of the first levels away.
            exact = torch.promote_types(latents.dtype, torch.float32)
            return scheduler.add_noise(latents.to(exact), noise.to(exact), timesteps).to(latents.dtype)
        alphas = scheduler.alphas_cumprod.to(timesteps.device)
        sigmas = ((1 - alphas) / alphas).sqrt()
        below = timesteps.floor().long().clamp(0, len(sigmas) - 2)
        sigma = torch.lerp(sigmas[below], sigmas[below + 1], timesteps.float() - below)[:, None, None, None]
        return ((latents + sigma * noise) / (sigma.square() + 1).sqrt()).to(latents.dtype)

    def to_json_string(self) -> str:
        """Configuration as a plain U-Net's: its weights are one's, and any program shall load them."""
        return (
            json.dumps({**json.loads(super().to_json_string()), "_class_name": "UNet2DConditionModel"}, indent=2) + "\n"
        )
