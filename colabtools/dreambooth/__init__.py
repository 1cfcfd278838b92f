"""DreamBooth training on a handful of photos: prepare, train, generate, export."""

__all__: list[str] = []
