"""How much of the subject stays in a square cut from a photo, and what does the search cost?

    python benchmarks/crop.py --photos DIR

DIR holds the folders backpack, cat, clock, dog, dog6 and teapot of google/dreambooth (CC BY 4.0),
whose subjects were boxed here by eye, to about two hundredths of a side. Every photo is square, so
cases are made of it: windows of 3:2 and 2:3 at either end ("real"), and the photo made longer to
3:2 and 16:9 on one side by strips of its own background, mirrored ("longer"). People are
scikit-image's astronaut set on other photos. A case's score is the part of the box that the crop
keeps, of the most that any crop of that size could keep.

Ours is held against the centred square and against the method of the web UIs' auto-crop, written
anew: the weighted mean of the centres of faces (0.9), corners (0.5) and of the window with the
highest entropy (0.15), at the shorter side's final size; with scikit-image's detectors in place of
OpenCV's, which is no part of this environment.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from skimage.feature import corner_peaks, corner_shi_tomasi

from colabtools.images import cut, find_crop, find_faces, load_upright
from colabtools.images.crop import FaceBox as Box

# Left, top, right and bottom of the subject in parts of the photo's side, photos sorted by name.
BOXES: dict[str, list[Box]] = {
    "backpack": [
        (0.31, 0.15, 0.76, 0.77),
        (0.32, 0.15, 0.735, 0.71),
        (0.19, 0.05, 0.91, 0.93),
        (0.44, 0.07, 1.0, 0.92),
        (0.29, 0.13, 0.64, 0.88),
        (0.13, 0.06, 0.66, 0.90),
    ],
    "cat": [
        (0.01, 0.14, 0.97, 0.85),
        (0.15, 0.02, 0.705, 0.98),
        (0.03, 0.08, 0.60, 0.97),
        (0.32, 0.08, 0.86, 0.97),
        (0.185, 0.06, 0.78, 1.0),
    ],
    "clock": [
        (0.33, 0.38, 0.52, 0.62),
        (0.36, 0.355, 0.56, 0.61),
        (0.30, 0.24, 0.815, 0.82),
        (0.21, 0.11, 0.765, 0.83),
        (0.20, 0.10, 0.78, 0.915),
        (0.37, 0.415, 0.715, 0.865),
    ],
    "dog": [
        (0.09, 0.22, 0.92, 1.0),
        (0.21, 0.12, 0.855, 0.96),
        (0.215, 0.195, 1.0, 0.93),
        (0.13, 0.18, 0.925, 0.905),
        (0.275, 0.02, 0.955, 1.0),
    ],
    "dog6": [
        (0.035, 0.21, 0.615, 0.93),
        (0.15, 0.02, 0.82, 0.98),
        (0.16, 0.0, 0.81, 0.99),
        (0.185, 0.095, 0.80, 0.91),
        (0.095, 0.02, 0.85, 1.0),
    ],
    "teapot": [
        (0.33, 0.11, 0.865, 0.60),
        (0.305, 0.44, 0.62, 0.655),
        (0.04, 0.365, 0.57, 0.735),
        (0.385, 0.465, 0.675, 0.655),
        (0.205, 0.355, 0.60, 0.645),
    ],
}
SIDE = 768
WINDOWS = {
    "top": (0, 0, 1, 2 / 3),
    "bottom": (0, 1 / 3, 1, 1),
    "left": (0, 0, 2 / 3, 1),
    "right": (1 / 3, 0, 1, 1),
}
# Below these nothing of the subject is left to keep, or no background to make a strip of.
LEAST_VISIBLE, LEAST_STRIP_PX = 0.1, 24
PERSON, FACE = (20, 10, 430, 512), (178, 65, 265, 175)

Method = Callable[[Image.Image], Box]


@dataclass(frozen=True)
class Case:
    """A picture, the box of its subject in pixels, and which kind of case it is."""

    kind: str
    picture: Image.Image
    box: Box


def photo_cases(folder: Path) -> Iterator[Case]:
    for name, boxes in BOXES.items():
        paths = sorted((folder / name).glob("*.jpg"))
        for path, box in zip(paths, boxes, strict=True):
            photo = load_upright(path).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            pixels = tuple(SIDE * value for value in box)
            yield from windows(photo, pixels)
            yield from longer(photo, pixels)


def windows(photo: Image.Image, box: Box) -> Iterator[Case]:
    for window in WINDOWS.values():
        left, top, right, bottom = (round(SIDE * value) for value in window)
        inside = (
            max(box[0], left) - left,
            max(box[1], top) - top,
            min(box[2], right) - left,
            min(box[3], bottom) - top,
        )
        if area(inside) >= LEAST_VISIBLE * area(box):
            yield Case("real", photo.crop((left, top, right, bottom)), inside)


def longer(photo: Image.Image, box: Box) -> Iterator[Case]:
    """Photos turned so that the free side is the left one, made longer there, and turned back."""
    pixels = np.asarray(photo)
    for ratio in (3 / 2, 16 / 9):
        for quarter in range(4):
            turned, inside = np.rot90(pixels, quarter), turn_box(box, quarter)
            strip = int(inside[0])
            if strip < LEAST_STRIP_PX:
                continue
            need = round(SIDE * (ratio - 1))
            there_and_back = [turned[:, :strip][:, ::-1], turned[:, :strip]]
            times = -(-need // (2 * strip))
            # The strip next to the photo is the mirrored one.
            added = np.concatenate((there_and_back * times)[::-1], axis=1)
            added = added[:, -need:] if times else added
            whole = np.concatenate([added, turned], axis=1)
            moved = (inside[0] + need, inside[1], inside[2] + need, inside[3])
            width = whole.shape[1]
            back = np.rot90(whole, -quarter)
            yield Case(
                "longer", Image.fromarray(np.ascontiguousarray(back)), unturn(moved, width, quarter)
            )


def turn_box(box: Box, quarter: int) -> Box:
    """The box after that many quarter turns to the left of a square photo."""
    for _ in range(quarter):
        box = (box[1], SIDE - box[2], box[3], SIDE - box[0])
    return box


def unturn(box: Box, width: int, quarter: int) -> Box:
    size = (width, SIDE)
    for _ in range(quarter):
        # A quarter turn to the right: x' = height - y, y' = x.
        box = (size[1] - box[3], box[0], size[1] - box[1], box[2])
        size = (size[1], size[0])
    return box


def people() -> Iterator[tuple[Case, Box]]:
    """The astronaut at the left, in the middle and at the right of other photos; and her face."""
    person = Image.fromarray(data.astronaut()).crop(PERSON)
    for scene in ("brick", "chelsea", "coffee", "grass", "gravel", "rocket"):
        for ratio, scale in ((3 / 2, 1.0), (3 / 2, 0.6), (16 / 9, 1.0), (16 / 9, 0.6)):
            size = (round(person.width * scale), round(person.height * scale))
            height = person.height
            width = round(height * ratio)
            for place in (0.0, 0.5, 1.0):
                picture = Image.fromarray(getattr(data, scene)()).convert("RGB")
                picture = picture.resize((width, height))
                left, top = round(place * (width - size[0])), height - size[1]
                picture.paste(person.resize(size), (left, top))
                face = tuple(
                    corner + scale * (at - start)
                    for corner, at, start in zip((left, top) * 2, FACE, PERSON[:2] * 2, strict=True)
                )
                box = (float(left), float(top), float(left + size[0]), float(height))
                yield Case("person", picture, box), face


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def score(box: Box, crop: Box, size: tuple[int, int]) -> float:
    side = min(size)
    both = (
        max(box[0], crop[0]),
        max(box[1], crop[1]),
        min(box[2], crop[2]),
        min(box[3], crop[3]),
    )
    most = min(box[2] - box[0], side) * min(box[3] - box[1], side)
    return area(both) / most


def centred(picture: Image.Image) -> Box:
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    return (left, top, left + side, top + side)


def ours(picture: Image.Image) -> Box:
    return find_crop(picture, 512, 512)


def ours_with_faces(picture: Image.Image) -> Box:
    return find_crop(picture, 512, 512, faces=find_faces(picture))


def points_of_interest(picture: Image.Image) -> Box:
    """The web UIs' method: where the weighted mean of three kinds of points is the middle."""
    factor = 512 / min(picture.size)
    small = picture.resize((round(picture.width * factor), round(picture.height * factor)))
    kinds = [(0.5, corner_points(small)), (0.15, [busiest(small)])]
    faces = find_faces(small)
    if faces:
        centres = [((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in faces]
        kinds.append((0.9, centres))
    kinds = [(weight, points) for weight, points in kinds if points]
    total = sum(weight for weight, _ in kinds)
    x, y = (
        sum(weight * statistics.fmean(point[axis] for point in points) for weight, points in kinds)
        / total
        for axis in (0, 1)
    )
    left = min(max(0.0, x - 256), small.width - 512)
    top = min(max(0.0, y - 256), small.height - 512)
    return (left / factor, top / factor, (left + 512) / factor, (top + 512) / factor)


def corner_points(picture: Image.Image) -> list[tuple[float, float]]:
    """At most a hundred corners (Shi and Tomasi), none in the lowest tenth, where marks are."""
    grey = np.asarray(picture.convert("L"), dtype=float)
    grey[int(0.9 * len(grey)) :] = 153
    peaks = corner_peaks(
        corner_shi_tomasi(grey),
        min_distance=int(min(picture.size) * 0.06),
        threshold_rel=0.04,
        num_peaks=100,
    )
    return [(float(column), float(row)) for row, column in peaks]


def busiest(picture: Image.Image) -> tuple[float, float]:
    """The middle of the square whose histogram of black and white has the highest entropy."""
    bits = np.asarray(picture.convert("1"))
    best, middle = -1.0, (picture.width / 2, picture.height / 2)
    length, wide = max(picture.size), picture.width > picture.height
    for start in range(0, length - 512 + 1, 4):
        window = bits[:, start : start + 512] if wide else bits[start : start + 512]
        share = np.bincount(window.ravel(), minlength=2) / window.size
        entropy = -float((share[share > 0] * np.log2(share[share > 0])).sum())
        if entropy > best:
            at = start + 256.0
            best, middle = entropy, (at, 256.0) if wide else (256.0, at)
    return middle


METHODS: dict[str, Method] = {
    "centred square": centred,
    "points of interest": points_of_interest,
    "ours": ours,
    "ours, faces too": ours_with_faces,
}


def row(name: str, scores: list[float]) -> str:
    values = np.array(scores)
    return (
        f"  {name:20} {values.mean():.3f} mean, {np.percentile(values, 10):.3f} for a tenth, "
        f"{(values < 0.75).mean():4.0%} below 0.75, {(values >= 0.95).mean():4.0%} from 0.95 on"
    )


def processor_ms(call: Callable[[], object], times: int) -> float:
    call()
    spent = []
    for _ in range(times):
        begin = time.process_time()
        call()
        spent.append(time.process_time() - begin)
    return 1000 * statistics.median(spent)


def costs(folder: Path) -> None:
    """Print what a photo of about 1 and of 12 million pixels costs, from the file to the square."""
    source = load_upright(sorted((folder / "dog6").glob("*.jpg"))[0])
    source = source.crop((0, 0, source.width, round(source.width * 2 / 3)))
    for size in ((1280, 853), (4256, 2836)):
        path = Path(tempfile.gettempdir()) / f"colabtools-crop-{size[0]}.jpg"
        source.resize(size, Image.Resampling.LANCZOS).save(path, quality=92)

        def plain(path: Path = path) -> None:
            picture = load_upright(path)
            cut(picture, centred(picture), (512, 512))

        def searched(method: Method, path: Path = path) -> None:
            picture = load_upright(path)
            cut(picture, method(picture), (512, 512))

        times = {name: processor_ms(lambda m=m: searched(m), 5) for name, m in METHODS.items()}
        base = processor_ms(plain, 5)
        listing = ", ".join(f"{name} {ms:.0f} ms ({ms / base:.2f}x)" for name, ms in times.items())
        print(f"  {size[0]}x{size[1]}: decoded and resized {base:.0f} ms; {listing}")
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of google/dreambooth")
    folder = parser.parse_args().photos
    cases = list(photo_cases(folder))
    for kind in ("real", "longer", "all"):
        chosen = [case for case in cases if kind in (case.kind, "all")]
        print(f"{kind}: {len(chosen)} cases")
        for name, method in METHODS.items():
            found = [score(c.box, method(c.picture), c.picture.size) for c in chosen]
            print(row(name, found), flush=True)
    persons = list(people())
    print(f"people: {len(persons)} cases, first the person, then the face alone")
    for name, method in METHODS.items():
        crops = [method(case.picture) for case, _ in persons]
        for box_of in (lambda c, _: c.box, lambda _, face: face):
            found = [
                score(box_of(case, face), crop, case.picture.size)
                for (case, face), crop in zip(persons, crops, strict=True)
            ]
            print(row(name, found), flush=True)
    print("processor time of a photo, from the file to a square of 512 px:")
    costs(folder)


if __name__ == "__main__":
    main()
