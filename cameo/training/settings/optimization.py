"""Settings of the optimizer and its schedule."""

from __future__ import annotations

from dataclasses import dataclass

from cameo.settings import Settings, setting

__all__ = ["OptimizerSettings", "ScheduleSettings"]

LR_SCHEDULERS = ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts", "linear", "polynomial")


@dataclass
class ScheduleSettings(Settings):
    """Schedule: how long, in what order, at which noise."""

    # Seed of fresh weights, data order and noise, >= 0; the same seed is the same run. 0 by default.
    seed: int = setting(0, at_least=0)
    # Optimizer steps, >= 1. 1000 by default. Resuming may change it; where lr_scheduler or weight_schedule decay, the
    # rest of their curve then changes too.
    max_train_steps: int = setting(1000, at_least=1, changeable=True)
    # Samples per step and process, >= 1. 4 by default.
    train_batch_size: int = setting(4, at_least=1)
    # Batches whose gradients are added up for one optimizer step, >= 1. 1 by default.
    gradient_accumulation_steps: int = setting(1, at_least=1)
    # Learning rate over the steps: one of diffusers' schedules. constant by default.
    lr_scheduler: str = setting("constant", choices=LR_SCHEDULERS)
    # Steps in which the learning rate rises to learning_rate, >= 0; for every lr_scheduler but constant. 0 by default.
    lr_warmup_steps: int = setting(0, at_least=0)
    # How noise levels are drawn: uniform (the default), or high_noise, 1 - u**2 with u uniform, where alignment
    # matters most.
    timestep_sampling: str = setting("uniform", choices=("uniform", "high_noise"))
    # Share of the samples that are trained without their condition, in [0, 1), so that guidance can be used. 0.1 by
    # default, as is usual.
    condition_dropout: float = setting(0.1, share="[0, 1)")

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError(
                "lr_warmup_steps has no effect with lr_scheduler=constant; use lr_scheduler=constant_with_warmup"
            )


@dataclass
class OptimizerSettings(Settings):
    """Optimizer: AdamW, clipping, precision, averaged weights."""

    # Learning rate of AdamW, >= 0. 1e-4 by default, as in diffusers' scripts; LoRA on tiny models takes 4e-3.
    learning_rate: float = setting(1e-4, at_least=0)
    # Decay of AdamW's mean of the gradients, in [0, 1). 0.9 by default, as in torch.
    adam_beta1: float = setting(0.9, share="[0, 1)")
    # Decay of AdamW's mean of the squared gradients, in [0, 1). 0.999 by default, as in torch.
    adam_beta2: float = setting(0.999, share="[0, 1)")
    # Weight decay of AdamW, >= 0. 0.01 by default, as in torch.
    adam_weight_decay: float = setting(1e-2, at_least=0)
    # Added to AdamW's divisor, >= 0. 1e-8 by default, as in torch.
    adam_epsilon: float = setting(1e-8, at_least=0)
    # Largest norm of the gradient, > 0; longer ones are cut to it. 1 by default, as in diffusers' scripts.
    max_grad_norm: float = setting(1.0, above=0)
    # Precision of the forward pass and of the VAE's encoder: no (float32, the default), fp16 (on a GPU only) or bf16. A
    # VAE whose config says force_upcast encodes in float32 with fp16.
    mixed_precision: str = setting("no", choices=("no", "fp16", "bf16"))
    # Whether float32 products may round to TF32 on a GPU: faster, less exact. false by default, as in torch.
    allow_tf32: bool = setting(False, changeable=True)
    # What torch.compile compiles: off (nothing, the default, as it takes minutes at the start), default (the whole
    # model as one graph) or regional (each repeated block, which takes less). Steps with an alignment loss stay
    # compiled where the supervised layers attend by SDPA.
    torch_compile: str = setting("off", choices=("off", "default", "regional"), changeable=True)
    # Whether weights averaged over the steps are kept, validated and saved. false by default.
    use_ema: bool = setting(False)
    # Share of the old average that a step keeps, in [0, 1). 0.9995 by default: averages over about 2000 steps.
    ema_decay: float = setting(0.9995, share="[0, 1)")
