"""The training pictures of a session: photos made upright RGB of few sizes, with captions."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colabtools import images, micro
from colabtools.dreambooth.captions import (
    CAPTION_SUFFIXES,
    check_captions,
    index_captions,
    read_caption,
)
from colabtools.dreambooth.doctor import examine_all, recall, save_report, save_sheet
from colabtools.dreambooth.photos import Cutting, Photo, pixels_digest
from colabtools.dreambooth.session import create_session, planned_session
from colabtools.dreambooth.tokens import count_tokens
from colabtools.drive import atomic_path, sha256_of, workspace_error, write_atomic
from colabtools.errors import ConfigError, DatasetError, ImageError, WorkspaceError
from colabtools.report import get_logger, progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from colabtools.dreambooth.config import PrepareConfig
    from colabtools.dreambooth.session import Session
    from colabtools.drive import Workspace

__all__ = [
    "Example",
    "Prepared",
    "check_examples",
    "fingerprint",
    "first_captions",
    "load_examples",
    "prepare",
    "split_heldout",
]

# A VAE of Stable Diffusion or Flux makes one latent of 8 x 8 pixels, and drops what is over.
_LATENT_PX = 8


@dataclass(frozen=True)
class Example:
    """A training picture, its caption, and its width and height in pixels."""

    path: Path
    caption: str
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare` made.

    Attributes:
        session: where everything is.
        examples: the training pictures.
        photos: what became of each photo, those that were left out too.
        contact_sheet: a picture of the photos and what was cut from them.
        report: a page that tells of every photo; a file of the same name in JSON is beside it.
    """

    session: Session
    examples: tuple[Example, ...]
    photos: tuple[Photo, ...]
    contact_sheet: Path
    report: Path


def prepare(workspace: Workspace, session_name: str, config: PrepareConfig) -> Prepared:
    """Put a folder of photos into a session as upright RGB pictures, with their captions.

    They become squares or, with `config.buckets`, the nearest of a few shapes of that area. The
    photos themselves are only read; those that cannot be used, and all but one of those that show
    the same, are left out with a reason. Captions that were edited in the session stay as they
    are. Done twice with the same photos, the second time changes nothing, and decodes only what is
    new.

    Raises:
        ConfigError: the base model was not made for this resolution.
        DatasetError: there are no photos, none can be used, a caption cannot be read, or the
            session holds other pictures and `replace` is off.
        MissingDependencyError: ImageHash is not installed.
        ModelError: the base model is not known.
        SessionBusyError: another runtime is writing to the session.
        SessionError: the name cannot be a folder's, or the session's record is damaged.
        WorkspaceError: the pictures cannot be stored.
    """
    cutting = Cutting.of(config)
    found = _find_photos(config.images)
    written = _find_captions(found, config.instance_prompt.strip())
    session = planned_session(workspace, session_name)
    with tempfile.TemporaryDirectory(prefix="colabtools-photos-") as staging:
        photos = examine_all(found, cutting, session, Path(staging))
        session = create_session(workspace, session_name)
        with session.writing("prepare"):
            return _put_in_place(session, photos, written, config)


def _put_in_place(
    session: Session, photos: tuple[Photo, ...], written: dict[str, str], config: PrepareConfig
) -> Prepared:
    """Store what is new, draw the contact sheet, and write both into the session's record."""
    used = [photo for photo in photos if not photo.reason]
    sources = {photo.path.stem: written[photo.path.stem] for photo in used}
    captions = _keep_edits(session, sources)
    stored = _store(session, used, captions, replace=config.replace)
    examples = load_examples(session)
    sheet = session.logs_dir / "training_pictures.png"
    if stored or not sheet.is_file():
        save_sheet(photos, captions, sheet)
    tokens = count_tokens(config.base_model, set(captions.values()))
    report = save_report(session, photos, captions, sources, tokens)
    session.update_record(
        base_model=config.base_model,
        instance_prompt=config.instance_prompt.strip(),
        resolution=config.side,
        buckets=config.buckets,
        pictures=fingerprint(examples),
    )
    return Prepared(
        session=session, examples=examples, photos=photos, contact_sheet=sheet, report=report
    )


def _find_captions(photos: Sequence[Path], default: str) -> dict[str, str]:
    """Return the caption that comes with each photo, by its stem."""
    index = index_captions(photos[0].parent)
    default = " ".join(default.split())
    found = {}
    for photo in photos:
        files = index.get(unicodedata.normalize("NFC", photo.stem), [])
        found[photo.stem] = _first_caption(files) or default
    return found


def _keep_edits(session: Session, sources: dict[str, str]) -> dict[str, str]:
    """Return the captions with those that were edited in the session as they are there.

    An edit counts as long as the caption that came with the photo is what it was then.
    """
    before = recall(session).get("captions", {})
    captions = dict(sources)
    for stem, source in sources.items():
        path = session.captions_dir / f"{stem}.txt"
        if before.get(stem) == source and path.is_file():
            captions[stem] = read_caption(path)
    return captions


def _find_photos(text: str) -> list[Path]:
    try:
        folder = micro.subject_path() if text == "demo" else Path(text).expanduser()
        if folder.is_file():
            raise DatasetError(f"images {str(folder)!r} is a file; give the folder that it is in")
        if not folder.is_dir():
            raise DatasetError(f"images {str(folder)!r} does not exist; give a folder of photos")
        photos = sorted(_pictures_in(folder), key=lambda path: (path.stem, path.name))
    except (OSError, RuntimeError) as error:
        raise DatasetError(f"images {text!r} cannot be read ({error}); give another folder") from (
            error
        )
    if not photos:
        suffixes = ", ".join(sorted(images.PHOTO_SUFFIXES))
        raise DatasetError(f"no photos in {str(folder)!r}; put some of {suffixes} there")
    return photos


def _pictures_in(folder: Path) -> Iterable[Path]:
    """Return the picture files of a folder; hidden ones are what a Mac or Drive leaves there."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in images.PHOTO_SUFFIXES)
    return (path for path in found if path.is_file() and not path.name.startswith("."))


def _sidecars(path: Path) -> list[Path]:
    """Return the caption files that a picture, or a path named like it, has beside it."""
    candidates = (path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)
    return [candidate for candidate in candidates if candidate.is_file()]


def _first_caption(sidecars: list[Path]) -> str:
    """Return the text of the first file that holds any."""
    return next(filter(None, map(read_caption, sidecars)), "")


def _store(
    session: Session, photos: list[Photo], captions: dict[str, str], *, replace: bool
) -> bool:
    """Put pictures and captions in place, each folder in one move; return whether any was new."""
    pictures, texts = session.instance_images_dir, session.captions_dir
    changed = []
    if not _holds_pictures(pictures, photos):
        changed.append(pictures)
    if not _holds_captions(texts, captions):
        changed.append(texts)
    parts = {folder: folder.with_name(f".{folder.name}.part") for folder in changed}
    try:
        _make_sure_free(changed, session, replace=replace)
        for folder, part in parts.items():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            if folder == pictures:
                _write_pictures(part, photos)
            else:
                _write_captions(part, captions)
        _move_aside(changed)
        for folder, part in parts.items():
            part.rename(folder)
    except WorkspaceError:
        raise
    except OSError as error:
        raise workspace_error("store the training pictures in", session.folder, error) from error
    finally:
        for part in parts.values():
            shutil.rmtree(part, ignore_errors=True)
    return bool(changed)


def _holds_pictures(folder: Path, photos: list[Photo]) -> bool:
    """Compare pixels: the bytes of a PNG change with the library that writes it."""
    files = {path.name: path for path in _visible(folder)}
    wanted = {f"{photo.path.stem}.png": photo for photo in photos}
    try:
        return files.keys() == wanted.keys() and all(
            files[name] == photo.picture or _has_pixels(files[name], photo)
            for name, photo in wanted.items()
        )
    except ImageError:
        return False


def _has_pixels(path: Path, photo: Photo) -> bool:
    return pixels_digest(images.load_upright(path)) == photo.pixels


def _holds_captions(folder: Path, captions: dict[str, str]) -> bool:
    files = {path.name: path for path in _visible(folder)}
    wanted = {f"{stem}.txt": caption for stem, caption in captions.items()}
    try:
        return files.keys() == wanted.keys() and all(
            read_caption(files[name]) == caption for name, caption in wanted.items()
        )
    except DatasetError:
        return False


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _write_pictures(folder: Path, photos: list[Photo]) -> None:
    with progress(photos, desc="storing pictures", unit="pictures") as each:
        for photo in each:

            def verify(partial: Path, photo: Photo = photo) -> None:
                if not _has_pixels(partial, photo):
                    raise ImageError(
                        f"{photo.path.stem}.png reads back changed; check the disk, then again"
                    )

            assert photo.picture is not None
            with atomic_path(folder / f"{photo.path.stem}.png", verify=verify) as partial:
                shutil.copyfile(photo.picture, partial)


def _write_captions(folder: Path, captions: dict[str, str]) -> None:
    for stem, caption in captions.items():
        write_atomic(folder / f"{stem}.txt", f"{caption}\n".encode())


def _make_sure_free(folders: list[Path], session: Session, *, replace: bool) -> None:
    for folder in folders:
        if not replace and (count := len(_visible(folder))):
            what = "pictures" if folder == session.instance_images_dir else "captions"
            raise DatasetError(
                f"session {session.name!r} already holds {count} {what} that are not these; "
                "choose another session name, or set replace to keep those aside"
            )


def _move_aside(folders: list[Path]) -> None:
    """Rename folders that are there to `<name>.old-<number>`, all with the same number."""
    number = 1
    while any(folder.with_name(f"{folder.name}.old-{number}").exists() for folder in folders):
        number += 1
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        elif folder.exists():
            aside = folder.rename(folder.with_name(f"{folder.name}.old-{number}"))
            get_logger(__name__).info("kept the former %s as %s", folder.name, aside.name)


def load_examples(session: Session) -> tuple[Example, ...]:
    """Return the training pictures of a session with their captions, sorted by name.

    Raises:
        DatasetError: there are none, or a picture has no readable caption.
        ImageError: what stands under a picture's name is none.
        WorkspaceError: the folder cannot be read.
    """
    folder = session.instance_images_dir
    try:
        found = sorted(_pictures_in(folder)) if folder.is_dir() else []
    except OSError as error:
        raise workspace_error("read", folder, error) from error
    if not found:
        raise DatasetError(
            f"session {session.name!r} has no training pictures; "
            "run prepare with a folder of photos"
        )
    examples = []
    for path in found:
        sidecars = _sidecars(session.captions_dir / path.name)
        if not sidecars:
            raise DatasetError(
                f"{path.name} of session {session.name!r} has no caption; "
                f"write one to {session.captions_dir / path.stem}.txt or run prepare again"
            )
        examples.append(Example(path, _first_caption(sidecars), images.upright_size(path)))
    return tuple(examples)


def check_examples(session: Session, examples: Sequence[Example], *, strict: bool) -> None:
    """Return if all pictures of a session can be trained on: decode each of them, once.

    Args:
        session: where the captions are.
        examples: all pictures of it.
        strict: refuse empty captions, and captions of no picture, rather than warn of them.

    Raises:
        DatasetError: a picture has a size that is no multiple of 8, or a caption is refused.
        ImageError: a picture cannot be decoded to its end.
        WorkspaceError: the storage failed.
    """
    for example in examples:
        if any(side % _LATENT_PX for side in example.size):
            raise DatasetError(
                f"{example.path.name} of session {session.name!r} is "
                f"{example.size[0]} x {example.size[1]} pixels; both must be multiples of "
                f"{_LATENT_PX}, so prepare these photos into a session of another name"
            )
    with progress(examples, desc="checking pictures", unit="pictures") as each:
        for example in each:
            images.load_upright(example.path)
    check_captions([example.path for example in examples], session.captions_dir, strict=strict)


def first_captions(examples: Sequence[Example], count: int = 2) -> tuple[str, ...]:
    """Return the first different captions that hold text: prompts where none are given.

    Where none holds text it is the empty prompt.
    """
    captions = (example.caption for example in examples if example.caption.strip())
    return tuple(dict.fromkeys(captions))[:count] or ("",)


def split_heldout(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return the examples to train on and `count` others, both in the order that they had.

    A digest of each picture's name and the seed decides, so pictures that are added later leave
    most of the others where they are.

    Raises:
        ConfigError: none would be left to train on.
    """
    if count >= len(examples):
        raise ConfigError(
            f"heldout_images is {count} and there are {len(examples)} training pictures; "
            f"give at most {len(examples) - 1}"
        )

    def lot(example: Example) -> bytes:
        # A Mac spells the same name with other characters.
        name = unicodedata.normalize("NFC", example.path.name)
        return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()

    heldout = set(sorted(examples, key=lot)[:count])
    train = tuple(example for example in examples if example not in heldout)
    return train, tuple(example for example in examples if example in heldout)


def fingerprint(examples: tuple[Example, ...]) -> str:
    """Return a digest of all pictures and captions."""
    digest = hashlib.sha256()
    for example in examples:
        line = f"{example.path.name}\0{sha256_of(example.path)}\0{example.caption}\0"
        digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
