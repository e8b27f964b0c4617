"""What the adapters share: pipelines on latents, attention layers of U-Nets, joined views, presets."""
