"""The trainer: image-latent pairs in, an image-only student out."""
