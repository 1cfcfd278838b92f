"""What a command of this pillar is told; every field is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from colabtools.fields import check, check_choice, check_flag, check_text, check_whole, split_text

__all__ = [
    "BACKENDS",
    "DECODINGS",
    "DTYPES",
    "FITS",
    "ClassifyConfig",
    "EmbedConfig",
    "ModelConfig",
    "RunConfig",
]

BACKENDS = ("torch", "onnx", "openvino", "jax", "tensorflow")
DTYPES = ("fp32", "bf16", "fp16", "int8")
FITS = ("resize", "crop", "pad")
DECODINGS = ("exact", "fast")
_LARGEST_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which ViT, carried by what.

    Attributes:
        model: "micro" (the embedded one, which reads digits), a folder in transformers' layout, or
            a repository of the Hub such as google/vit-large-patch16-384.
        backend: torch, onnx, openvino, jax or tensorflow.
        dtype: fp32, bf16, fp16, int8, or "auto" for what is measured to be the fastest here.
        device: cpu, cuda or "auto".
        compile: "yes", "no", or "auto" for where it pays: let torch compile the network, which
            takes a minute.
        decoding: "exact", or "fast" to decode JPEGs of 6 megapixels and more at a fraction of
            their size, within 3 of 255 of the exact pixels.
        fit: how a picture gets the model's shape: "resize" squashes, "crop" cuts the sides, "pad"
            adds bars; "auto" for what the model was made with.
        allow_pickle: read pytorch_model.bin where there is no safetensors file; it is scanned and
            loaded without running code.
        revision: a branch, tag or commit of a Hub repository.
    """

    model: str = "micro"
    backend: str = "torch"
    dtype: str = "auto"
    device: str = "auto"
    compile: str = "auto"
    decoding: str = "exact"
    fit: str = "auto"
    allow_pickle: bool = False
    revision: str = ""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field has a value that cannot work.
        """
        check_text("model", self.model, "micro, a folder or a repository of the Hub")
        check_choice("backend", self.backend, BACKENDS)
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_choice("compile", self.compile, ("auto", "yes", "no"))
        check_choice("decoding", self.decoding, DECODINGS)
        check_choice("fit", self.fit, ("auto", *FITS))
        check_flag("allow_pickle", self.allow_pickle)
        check("revision", self.revision, isinstance(self.revision, str), "a text")


@dataclass(frozen=True, kw_only=True)
class RunConfig(ModelConfig):
    """A model over any number of pictures.

    Attributes:
        src: a picture, a folder, a pattern such as "photos/*.jpg", a .zip or .tar of pictures, a
            .csv or .parquet table with a column of paths.
        column: of a table, the column that holds paths; "auto" for one named path, file, image or
            filename.
        batch_size: pictures at a time; 0 for what is found to be fast.
        workers: threads that decode; 0 for one per processor.
        shard_size: pictures whose results are kept together; work that was cut off begins again at
            the last whole one.
        restart: forget what an earlier run left.
    """

    src: str
    column: str = "auto"
    batch_size: int = 0
    workers: int = 0
    shard_size: int = 2048
    restart: bool = False

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field has a value that cannot work.
        """
        super().__post_init__()
        check_text("src", self.src, "a picture, a folder, an archive or a table")
        check_text("column", self.column, "a column's name, or auto")
        check_whole("batch_size", self.batch_size, 0, _LARGEST_BATCH)
        check_whole("workers", self.workers, 0, 1024)
        check_whole("shard_size", self.shard_size, 1)
        check_flag("restart", self.restart)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RunConfig):
    """Classes of any number of pictures, as a table.

    Attributes:
        out: a .parquet, .csv or .jsonl file.
        top_k: classes kept of each picture.
    """

    out: str
    top_k: int = 5

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field has a value that cannot work.
        """
        super().__post_init__()
        suffixes = (".parquet", ".csv", ".jsonl")
        valid = isinstance(self.out, str) and self.out.lower().endswith(suffixes)
        check("out", self.out, valid, "a file that ends in .parquet, .csv or .jsonl")
        check_whole("top_k", self.top_k, 1)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(RunConfig):
    """Vectors of any number of pictures, as a folder.

    Attributes:
        out: a folder for the vectors.
        layers: after how many blocks, 0 before the first, -1 after the last; several are joined.
        pooling: "cls", the class token, or "mean", of the patches.
        norm: apply the model's final LayerNorm, as its head would see the tokens.
        normalize: bring each vector to length 1.
        vector_dtype: float16 or float32.
    """

    out: str
    layers: tuple[int, ...] = (-1,)
    pooling: str = "cls"
    norm: bool = True
    normalize: bool = True
    vector_dtype: str = "float16"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: a field has a value that cannot work.
        """
        super().__post_init__()
        check_text("out", self.out, "a folder")
        items = split_text("layers", self.layers, ",")
        layers = tuple(int(i) if str(i).strip().lstrip("-").isdigit() else i for i in items)
        object.__setattr__(self, "layers", layers)
        valid = len(layers) > 0 and all(isinstance(layer, int) for layer in layers)
        check("layers", self.layers, valid, "whole numbers, such as -1")
        check_choice("pooling", self.pooling, ("cls", "mean"))
        check_flag("norm", self.norm)
        check_flag("normalize", self.normalize)
        check_choice("vector_dtype", self.vector_dtype, ("float16", "float32"))
