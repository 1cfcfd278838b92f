"""What each tensor is called in a folder of diffusers and in one file, as tables of data."""

__all__: list[str] = []
