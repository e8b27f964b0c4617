"""Settings of the training, one dataclass per component; `cameo.training.config.TrainingConfig` is all of them."""
