"""Vision transformers at work: classify, embed and search any number of images.

Shapes: B batch, C H W pixels, T tokens (the class token first), D width, K classes, N items.

Attention costs the square of T, and T grows with the square of the picture's side: 197 tokens at
224 px in patches of 16, 577 at 384 px. A model sees the picture as its own configuration says; the
ViTs of the original paper squash it to a square, they neither crop nor pad.
"""

from colabtools.vit.model import load

__all__ = ["load"]
