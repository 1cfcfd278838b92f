"""Helpers behind three Colab notebooks: ViT classification, DreamBooth training, A1111 web UI.

Shape letters used in every docstring: B batch, C H W pixels, h w latent, T tokens, D width, K
classes, N items.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
