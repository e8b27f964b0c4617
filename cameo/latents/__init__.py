"""Latents of the views of a training set, which a VAE computes once and the training reads."""
