"""The cache: images in, undecoded latents out, pairs out again."""

__version__ = "0.1.0"
