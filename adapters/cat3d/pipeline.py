"""A CAT3D-style multi-view diffusion model on diffusers' `UNet2DConditionModel` or a diffusion transformer.

All views of a sample are denoised together: self-attention joins their tokens. Each view is conditioned on its ray map
(Pluecker coordinates in the first view's camera frame) and a mask that tells clean reference views from
noised target views; reference views come first and enter as clean latents. Source: CAT3D, arXiv 2405.10314,
section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from einops import rearrange, repeat
from torch import Tensor

from cameo.adapters.cat3d.cameras import CONDITION_CHANNELS, camera_maps, without_cameras
from cameo.adapters.cat3d.denoiser import JointDiT
from cameo.adapters.common.diffusers_attention import set_kernel
from cameo.adapters.common.joint_views import check_joined, inflate
from cameo.adapters.common.latent_pipeline import LatentPipeline, reference_views
from cameo.adapters.common.noise_schedules import check_prediction_type
from cameo.adapters.common.positions import set_position
from cameo.adapters.common.sampler import sample_latents
from cameo.memory import sent_to
from cameo.pipeline import TrainingInputs

__all__ = ["Cat3DPipeline"]


class Cat3DPipeline(LatentPipeline):
    """Novel views from reference views and cameras.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> pipeline = get_backbone("cat3d").build("tiny")
        >>> batch = {
        ...     "images": torch.rand(1, 3, 3, 32, 32),
        ...     "intrinsics": torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(1, 3, 3, 3),
        ...     "extrinsics": torch.eye(4).expand(1, 3, 4, 4),
        ...     "num_reference_views": 1,
        ... }
        >>> pipeline.sample(batch, num_inference_steps=2).shape
        torch.Size([1, 2, 3, 32, 32])

    Args:
        unet: `UNet2DConditionModel` or `cameo.adapters.cat3d.denoiser.JointDiT`; takes latent channels + 7 condition
            channels; its self-attentions are inflated here.
        scheduler: noise schedule for training and sampling; prediction type "v_prediction", "epsilon" or "sample".
        vae: `AutoencoderKL` or `AutoencoderTiny`; None works on pixels, folded into channels by `patch_size`.
        patch_size: side of the pixel blocks that become one latent cell, without a VAE.
        position: "sincos" adds a map of positions behind the U-Net's first convolution, see
            `cameo.adapters.common.positions`; "none" takes it off.
        single_image_share: share of the training batches in which each view is an image of its own, without camera, and
            nothing is aligned (`TrainingInputs.aligned` is False). 0, the default, trains on views alone; the bundled
            base learned to paint from such batches.
    """

    backbone = "cat3d"
    model_cpu_offload_seq = "unet->vae"

    def __init__(
        self,
        unet: UNet2DConditionModel | JointDiT,
        scheduler: DDIMScheduler,
        vae: Any = None,
        patch_size: int = 4,
        position: str = "none",
        single_image_share: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= single_image_share < 1:
            raise ValueError(f"single_image_share: expected at least 0 and less than 1, got {single_image_share}")
        settings = scheduler.config
        check_prediction_type(scheduler)
        if settings.prediction_type == "epsilon" and settings.rescale_betas_zero_snr:
            raise ValueError(
                "scheduler: epsilon-prediction is not defined at zero terminal SNR; use "
                "prediction_type='v_prediction' or rescale_betas_zero_snr=False"
            )
        channels = unet.config.in_channels - CONDITION_CHANNELS
        expected = vae.config.latent_channels if vae is not None else 3 * patch_size**2
        if channels != expected or unet.config.out_channels != expected:
            raise ValueError(
                f"unet: expected {expected + CONDITION_CHANNELS} input and {expected} output channels "
                f"(latent plus {CONDITION_CHANNELS} condition channels), got {unet.config.in_channels} and "
                f"{unet.config.out_channels}"
            )
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        set_position(unet, position)
        self.register_to_config(patch_size=patch_size, position=position, single_image_share=single_image_share)
        inflate(unet, latent_stride=self.latent_stride)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Use xformers' kernel on CUDA in the denoiser; elsewhere, where it has none, PyTorch's goes on."""
        set_kernel(self.unet, xformers=True, attention_op=attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Go back to PyTorch's kernel."""
        set_kernel(self.unet, xformers=False)

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of an image must be a multiple of; for a transformer the side of its patches."""
        if isinstance(self.unet, JointDiT):
            return self.latent_stride * self.unet.config.patch_size
        return super().size_multiple

    def condition(
        self, intrinsics: Tensor, extrinsics: Tensor, num_reference_views: int, image_size: tuple[int, int]
    ) -> Tensor:
        """Build mask and ray maps `[B, V, 7, h, w]`, see `cameo.adapters.cat3d.cameras.camera_maps`."""
        height, width = image_size
        grid = (height // self.latent_stride, width // self.latent_stride)
        return camera_maps(intrinsics, extrinsics, num_reference_views, image_size, grid)

    def training_inputs(
        self,
        batch: Mapping[str, Any],
        *,
        generator: torch.Generator | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        condition_dropout: float = 0.0,
        joint: bool | None = None,
    ) -> TrainingInputs:
        """Noise the target views of a batch and build the denoiser's input and target.

        Args:
            batch: `images, intrinsics, extrinsics, num_reference_views`, see `cameo.data`.
            generator: source of time steps, noise and dropout; the same seed gives the same inputs.
            timesteps: integers `[B]`; default uniform over all noise levels.
            noise: `[B, V, C, h, w]`; default standard normal.
            condition_dropout: probability of blanking a sample's ray maps, for classifier-free guidance.
            joint: whether the views attend to each other, with their ray maps. Default: drawn by `single_image_share`
                while the denoiser is in training mode and no `noise` is given, else True.
        """
        images: Tensor = batch["images"]
        samples, views = images.shape[:2]
        height, width = images.shape[-2:]
        references = reference_views(batch, views)
        with torch.no_grad():
            clean = self.batch_latents(batch)
            condition = self.condition(batch["intrinsics"], batch["extrinsics"], references, (height, width))
        if joint is None:
            joint = self.draw_joint(noise, generator, images.device)
        timesteps, noise = self.draw(clean, generator, timesteps, noise)
        blank = self.blank(samples, condition_dropout, generator, images.device)
        condition[:, :, 1:].masked_fill_(blank[:, None, None, None, None], 0)
        target_views = torch.arange(views) >= references
        noised = sent_to(images.device, target_views)[:, None, None, None]
        noisy = torch.where(noised, self.scheduler.add_noise(clean, noise, timesteps), clean)
        target = self.denoising_target(clean, noise, timesteps)
        args, kwargs = self._unet_arguments(
            noisy, condition if joint else without_cameras(condition), timesteps, joint=joint
        )
        return TrainingInputs(args, kwargs, noisy, target, target_views, timesteps, aligned=joint)

    @torch.no_grad()
    def sample(
        self,
        batch: Mapping[str, Any],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Generate the target views by DDIM.

        Args:
            batch: `intrinsics, extrinsics [B, V, ...]`, `num_reference_views` R, and `images [B, >= R, 3, H,
                W]`, of which only the first R are used.
            num_inference_steps: number of denoising steps.
            guidance_scale: classifier-free guidance on the cameras; 1 switches it off.
            generator: the same seed gives the same views.
            progress: whether to show a progress bar.

        Returns:
            Images in [0, 1], `[B, V - R, 3, H, W]`.
        """
        samples, views = batch["extrinsics"].shape[:2]
        references = reference_views(batch, views)
        images: Tensor = batch["images"][:, :references]
        reference = self.encode(images)
        height, width = images.shape[-2:]
        condition = self.condition(batch["intrinsics"], batch["extrinsics"], references, (height, width))
        conditions = [condition] if guidance_scale == 1 else [condition, without_cameras(condition)]

        def predict(latents: Tensor, timestep: Tensor) -> list[Tensor]:
            noisy = torch.cat([reference, latents], dim=1).to(self.unet_dtype)
            outputs = []
            for cameras in conditions:
                args, kwargs = self._unet_arguments(noisy, cameras, timestep.expand(samples))
                outputs.append(self._views(self.unet(*args, **kwargs), samples)[:, references:])
            return outputs

        latents = sample_latents(
            self.scheduler,
            self.normal((samples, views - references, *reference.shape[2:]), generator, reference),
            predict,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            progress_bar=self.progress_bar if progress else None,
        )
        return self.decode(latents)

    def _unet_arguments(
        self, noisy: Tensor, condition: Tensor, timesteps: Tensor, *, joint: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        check_joined(self.unet)
        views = noisy.shape[1]
        sample = rearrange(torch.cat([noisy, condition.to(noisy)], dim=2), "b v c h w -> (b v) c h w")
        inputs = [sample, repeat(timesteps, "b -> (b v)", v=views)]
        if not isinstance(self.unet, JointDiT):
            # The text cross-attention of Stable Diffusion gets one token of zeros, which reduces it to a bias.
            inputs.append(sample.new_zeros(sample.shape[0], 1, self.unet.config.cross_attention_dim))
        return tuple(inputs), {"cross_attention_kwargs": {"num_views": views if joint else 1}}

    def prediction(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Views of the denoiser's output, `[B, V, C, h, w]`."""
        return self._views(output, inputs.noisy.shape[0])

    @staticmethod
    def _views(output: Any, samples: int) -> Tensor:
        return rearrange(output.sample, "(b v) c h w -> b v c h w", b=samples)
