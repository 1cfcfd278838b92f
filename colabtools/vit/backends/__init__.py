"""The runtimes that can carry a ViT; each is imported where it is asked for."""

__all__: list[str] = []
