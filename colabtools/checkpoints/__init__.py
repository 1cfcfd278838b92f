"""Weight files: names of tensors per layout, and single-file checkpoints."""

__all__: list[str] = []
