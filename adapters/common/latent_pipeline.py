"""What the pipelines of all backbones share: images and latents, noise, loss and the predicted clean image.

Axes: B samples, V views (reference views first), C channels, H W image pixels, h w latent cells.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from einops import rearrange
from torch import Tensor, nn

from cameo.adapters.common.positions import get_position
from cameo.errors import DataError, ShapeError
from cameo.memory import align_module, sent_to
from cameo.pipeline import TrainingInputs
from cameo.renamed.modules import place_today
from cameo.untrusted.asked import check_classes, check_pipeline

__all__ = ["LatentPipeline", "reference_views", "vae_stride"]


class LatentPipeline(DiffusionPipeline):
    """Base class of the pipelines: a denoiser `unet`, a `scheduler`, and a `vae` or folded pixels.

    A subclass registers these components, and the config value `patch_size` for `vae=None`: side of the pixel
    blocks that become one latent cell. It brings `training_inputs`, `prediction` and `sample`; a release with its
    own ranges overrides the four scaling methods.

    The VAE runs in the precision of its weights, or with `encoder_precision` encodes under autocast in a lower one.
    Where its config says `force_upcast`, as that of diffusers' VAEs does by default, it may overflow in float16, and
    runs in float32 instead.
    """

    _optional_components = ["vae"]  # noqa: RUF012 - diffusers concatenates lists
    # Precision of the encoder in mixed-precision training, bfloat16 or float16; None is that of its weights.
    encoder_precision: torch.dtype | None = None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a pipeline as diffusers does; on a CPU its output is that of the one that was saved, bit for bit.

        Raises:
            DataError: if a file is damaged, asks for more than `cameo.untrusted.asked.LIMITS`, or names a class of a
                foreign library, found out before anything is built; if that library is not installed.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if name is not None and Path(name).is_dir():
            cls._check(Path(name), kwargs)
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except ModuleNotFoundError as error:
            raise DataError(
                f"{name}: model_index.json names a component of {error.name}, which is not installed; install it, or "
                "name the library of the component"
            ) from error
        for component in loaded.components.values():
            if isinstance(component, nn.Module):
                align_module(component)
        return loaded

    @classmethod
    def download(cls, *args: Any, **kwargs: Any) -> Any:
        """Fetch a repository as diffusers does; it is checked as a local folder is, before it is used."""
        folder = super().download(*args, **kwargs)
        cls._check(Path(folder), kwargs)
        return folder

    @classmethod
    def _check(cls, folder: Path, given: Mapping[str, Any]) -> None:
        check_pipeline(folder)
        check_classes(folder, cls.__module__.split(".")[0], given)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """Write all components as diffusers does, with the map of positions that the denoiser has now."""
        if "position" in self.config:
            self.register_to_config(position=get_position(self.unet))
        return super().save_pretrained(save_directory, *args, **options)

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """Read `model_index.json` as diffusers does; names of classes from earlier releases become their current names.

        diffusers takes a component's class from a module that is imported already, and never imports one by its name.
        """
        loaded = super().load_config(*args, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for component, saved in config.items():
            if isinstance(saved, list) and len(saved) == 2 and None not in saved:
                current = list(place_today(*saved))
                if current != saved:
                    warnings.warn(
                        f"model_index.json: {component} is a {'.'.join(saved)}, which is now {'.'.join(current)}; "
                        "save the pipeline again to write the new name",
                        FutureWarning,
                        stacklevel=2,
                    )
                    config[component] = current
        return loaded

    @property
    def denoiser(self) -> nn.Module:
        """The module to wrap and to train, the component `unet`."""
        return self.unet

    @denoiser.setter
    def denoiser(self, module: Any) -> None:
        self.unet = module

    @property
    def num_train_timesteps(self) -> int:
        """Number of noise levels."""
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def latent_stride(self) -> int:
        """Image pixels per latent cell side."""
        return self.config.patch_size if self.vae is None else vae_stride(self.vae)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent cell."""
        return 3 * self.config.patch_size**2 if self.vae is None else int(self.vae.config.latent_channels)

    @property
    def unet_dtype(self) -> torch.dtype:
        """Precision of the denoiser's weights, beside which LoRA may be in float32.

        Samplers hand the denoiser its input in it, so that weights loaded in half precision need no autocast; the
        latents between the steps keep the precision of the images.
        """
        return next((parameter.dtype for parameter in self.unet.parameters()), torch.float32)

    @property
    def size_multiple(self) -> int:
        """Pixels that the sides of an image must be a multiple of: each block of the U-Net but one halves them."""
        return self.latent_stride * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape `[B, V, C, h, w]` of the latents of images `[B, V, 3, H, W]`."""
        batch, views, _, height, width = image_shape
        return batch, views, self.latent_channels, height // self.latent_stride, width // self.latent_stride

    def scale_image(self, images: Tensor) -> Tensor:
        """From images in [-1, 1] to the range that the encoder was trained on."""
        return images

    def unscale_image(self, images: Tensor) -> Tensor:
        """Undo `scale_image`."""
        return images

    def scale_latents(self, latents: Tensor) -> Tensor:
        """From what the encoder returns to the range that the denoiser was trained on."""
        return latents if self.vae is None else latents * getattr(self.vae.config, "scaling_factor", 1.0)

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """Undo `scale_latents`."""
        return latents if self.vae is None else latents / getattr(self.vae.config, "scaling_factor", 1.0)

    def encode(self, images: Tensor) -> Tensor:
        """Images `[B, V, 3, H, W]` in [0, 1] to latents `[B, V, C, h, w]`; of a VAE, the mode.

        Raises:
            ShapeError, ValueError: see `check_images`.
        """
        return self.scale_latents(self.encode_views(images))

    def encode_views(self, images: Tensor) -> Tensor:
        """As `encode`, but as the encoder gives them, not yet scaled: what `cache_latents=true` keeps.

        They are a function of the images alone, since a VAE's mode is taken and nothing is drawn.
        """
        self.check_images(images)
        return self.encode_unscaled(self.scale_image(images * 2 - 1))

    def encoded_together(self, num_views: int) -> list[list[int]]:
        """Return the views of a sample that the encoder sees as one image; each alone, unless a release says else."""
        return [[view] for view in range(num_views)]

    def batch_latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Latents `[B, V, C, h, w]` of a batch: of its `latents`, which `encode_views` gave, or of its `images`.

        Raises:
            ShapeError: if its latents do not belong to images of this size; see also `check_images`.
        """
        images, kept = batch["images"], batch.get("latents")
        if kept is None:
            return self.encode(images)
        if tuple(kept.shape) != self.latent_shape(images.shape):
            raise ShapeError("latents", expected=str(list(self.latent_shape(images.shape))), got=kept.shape)
        return self.scale_latents(kept.to(images.dtype))

    @property
    def latent_dtype(self) -> torch.dtype:
        """Precision in which the encoder gives latents; folded pixels are float32."""
        if self.vae is None:
            return torch.float32
        wanted = self.encoder_precision or self.vae.dtype
        overflows = wanted == torch.float16 and self.vae.config.get("force_upcast")
        return torch.float32 if overflows else wanted

    def _safe_vae(self) -> Any:
        """The VAE, in float32 from now on if it is in float16 and its config says `force_upcast`."""
        if self.vae.dtype == torch.float16 and self.vae.config.get("force_upcast"):
            self.vae.to(torch.float32)
        return self.vae

    def _encoder_autocast(self) -> AbstractContextManager[Any]:
        if self.latent_dtype == self.vae.dtype:
            return nullcontext()
        return torch.autocast(self.vae.device.type, dtype=self.latent_dtype)

    def check_images(self, images: Tensor) -> None:
        """Refuse what cannot be encoded.

        Raises:
            ShapeError: for another shape, or sides that are no multiple of `size_multiple`.
            ValueError: for integers.
        """
        if images.ndim != 5 or images.shape[2] != 3:
            raise ShapeError("images", expected="[B, V, 3, H, W]", got=images.shape)
        if not images.is_floating_point():
            raise ValueError(f"images: expected floats in [0, 1], got {images.dtype}; divide by 255")
        height, width = images.shape[-2:]
        multiple = self.size_multiple
        if height % multiple or width % multiple:
            raise ShapeError("images", expected=f"height and width divisible by {multiple}", got=images.shape)

    def encode_unscaled(self, images: Tensor) -> Tensor:
        """Images `[B, V, 3, H, W]` in the encoder's range to what it returns, `[B, V, C, h, w]`."""
        if self.vae is None:
            patch = self.config.patch_size
            return rearrange(images, "b v c (h p) (w q) -> b v (c p q) h w", p=patch, q=patch)
        vae = self._safe_vae()
        with self._encoder_autocast():
            encoded = vae.encode(rearrange(images, "b v c h w -> (b v) c h w").to(vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return rearrange(latents, "(b v) c h w -> b v c h w", b=images.shape[0]).to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, V, C, h, w]` to images `[B, V, 3, H, W]`, clamped to [0, 1]."""
        latents = self.unscale_latents(latents)
        if self.vae is None:
            patch = self.config.patch_size
            images = rearrange(latents, "b v (c p q) h w -> b v c (h p) (w q)", p=patch, q=patch)
        else:
            flat, vae = rearrange(latents, "b v c h w -> (b v) c h w"), self._safe_vae()
            images = vae.decode(flat.to(vae.dtype)).sample.to(latents.dtype)
            images = rearrange(images, "(b v) c h w -> b v c h w", b=latents.shape[0])
        return (self.unscale_image(images) / 2 + 0.5).clamp(0, 1)

    def draw(
        self, clean: Tensor, generator: torch.Generator | None, timesteps: Tensor | None, noise: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Time steps `[B]` and noise like `clean`; what is not given is drawn, uniform and standard normal."""
        if timesteps is None:
            device = generator.device if generator else clean.device
            timesteps = torch.randint(self.num_train_timesteps, (clean.shape[0],), generator=generator, device=device)
        if noise is None:
            noise = self.normal(clean.shape, generator, clean)
        return sent_to(clean.device, timesteps), sent_to(clean.device, noise).to(clean)

    @staticmethod
    def normal(shape: Sequence[int], generator: torch.Generator | None, like: Tensor) -> Tensor:
        """Draw standard normal numbers in float32 where the generator is, with the device and precision of `like`."""
        device = generator.device if generator else like.device
        return sent_to(like.device, torch.randn(shape, generator=generator, device=device)).to(like)

    @staticmethod
    def blank(samples: int, probability: float, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """Samples whose condition is dropped, bool `[B]`, for classifier-free guidance; draws nothing at 0."""
        if not probability > 0:
            return torch.zeros(samples, dtype=torch.bool, device=device)
        drawn = torch.rand(samples, generator=generator, device=generator.device if generator else device)
        return sent_to(device, drawn < probability)

    def draw_joint(self, noise: Tensor | None, generator: torch.Generator | None, device: torch.device) -> bool:
        """Whether the views of a batch attend to each other: all but `single_image_share` of the training batches.

        Without a draw where `noise` is given or the denoiser is not in training mode.
        """
        share = self.config.single_image_share if self.unet.training and noise is None else 0.0
        return not share > 0 or not bool(self.blank(1, share, generator, torch.device("cpu")))

    @property
    def train_scheduler(self) -> Any:
        """Noise levels of training: those of the sampler."""
        return self.scheduler

    def denoising_target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser is to predict: the noise, the velocity or the clean latents."""
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return clean
        return noise if kind == "epsilon" else self.train_scheduler.get_velocity(clean, noise, timesteps)

    def prediction(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Bring the denoiser's output to `[B, V, C, h, w]` in the view order of the batch."""
        raise NotImplementedError

    def clean_latents(self, prediction: Tensor, inputs: TrainingInputs) -> Tensor:
        """Clean latents `[B, V, C, h, w]` that a prediction stands for."""
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return prediction
        alpha = self.scheduler.alphas_cumprod.to(prediction.device)[inputs.timesteps][:, None, None, None, None]
        noisy = inputs.noisy.float()
        if kind == "epsilon":
            return (noisy - (1 - alpha).sqrt() * prediction) / alpha.sqrt()
        return alpha.sqrt() * noisy - (1 - alpha).sqrt() * prediction

    def denoising_loss(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Mean squared error of each sample over the views that carry a loss, in float32, `[B]`."""
        error = (self.prediction(output, inputs).float() - inputs.target.float()).square()
        return _chosen_views(error, inputs.loss_views).mean(dim=(1, 2, 3, 4))

    def predict_clean(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Images that the output stands for; views without a loss come back as they went in."""
        clean = self.clean_latents(self.prediction(output, inputs).float(), inputs)
        predicted = sent_to(clean.device, inputs.loss_views)[:, None, None, None]
        return self.decode(torch.where(predicted, clean, inputs.noisy.float()))


def _chosen_views(values: Tensor, chosen: Tensor) -> Tensor:
    """Views of `[B, V, ...]` by a mask `[V]` or by numbers, contiguous; by a mask on the CPU without an index."""
    if chosen.dtype == torch.bool and chosen.device.type == "cpu":
        places = chosen.nonzero()[:, 0].tolist()
        if places and places[-1] - places[0] + 1 == len(places):
            return values[:, places[0] : places[-1] + 1].contiguous()
    return values[:, chosen]


def reference_views(batch: Mapping[str, Any], views: int) -> int:
    """Return the number of reference views of a batch.

    Example:
        >>> reference_views({"num_reference_views": 1}, views=3)
        1

    Raises:
        ValueError: unless there is at least one reference and one target view.
    """
    references = int(batch["num_reference_views"])
    if not 0 < references < views:
        raise ValueError(f"num_reference_views: expected 1 to {views - 1} of {views} views, got {references}")
    return references


def vae_stride(vae: Any) -> int:
    """Image pixels per latent cell side of a diffusers autoencoder."""
    channels = getattr(vae.config, "block_out_channels", None) or vae.config.encoder_block_out_channels
    return int(2 ** (len(channels) - 1))
