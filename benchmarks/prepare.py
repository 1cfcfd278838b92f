"""How long do a thousand photos of 12 megapixels take, and how much memory?

    python benchmarks/prepare.py [--photos 1000]

Photos are made on the fly. Each line is one process: `prepare` for the first time, again, and with
one photo changed, and a plain loop that decodes each photo and scales its middle (Pillow, one
thread), which is the least that can be done. Peak memory is that of the process (ru_maxrss).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SIZE = (4000, 3000)
SIDE = 512

RUN = """
import resource, sys, time
from pathlib import Path
from colabtools.drive import Workspace
from colabtools.dreambooth.config import PrepareConfig
from colabtools.dreambooth.dataset import prepare
from colabtools.report import set_quiet
set_quiet(True)
config = PrepareConfig(images=sys.argv[1], base_model="micro", resolution={side},
                       allow_resolution=True, replace=True)
begun = time.perf_counter()
made = prepare(Workspace(Path(sys.argv[2])), "bench", config)
taken = time.perf_counter() - begun
print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(made.examples))
"""
LOOP = """
import resource, sys, time
from pathlib import Path
from PIL import Image
begun = time.perf_counter()
made = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    with Image.open(path) as photo:
        square = photo.convert("RGB").crop((500, 0, 3500, 3000))
        square.resize(({side}, {side}), Image.Resampling.LANCZOS)
    made += 1
taken = time.perf_counter() - begun
print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, made)
"""


def make_photo(path: Path, seed: int) -> None:
    """Write a JPEG of soft random shapes with grain, a few megabytes as from a phone."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, (SIZE[1] // 2, SIZE[0] // 2, 1), dtype=np.int16)
    grain = grain.repeat(2, axis=0).repeat(2, axis=1)
    values = (np.asarray(picture, dtype=np.int16) + grain).clip(0, 255).astype(np.uint8)
    Image.fromarray(values).save(path, quality=88)


def measure(code: str, *arguments: str) -> tuple[float, float, int]:
    """Run a program; return its seconds, its peak memory in MB, and how many pictures it made."""
    command = [sys.executable, "-c", code.replace("{side}", str(SIDE)), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    taken, peak, made = done.stdout.split()[-3:]
    return float(taken), float(peak), int(made)


def main() -> None:
    """Make the photos, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=1000)
    count = parser.parse_args().photos
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        photos.mkdir()
        paths = [photos / f"{number:05}.jpg" for number in range(count)]
        with ProcessPoolExecutor() as pool:
            list(pool.map(make_photo, paths, range(count)))
        size = sum(path.stat().st_size for path in paths)
        print(f"{count} photos of 12 MP, {size / 1e9:.1f} GB, {os.cpu_count()} cores", flush=True)
        workspace = str(Path(folder) / "workspace")
        first = report("prepare, first time", measure(RUN, str(photos), workspace))
        again = [measure(RUN, str(photos), workspace) for _ in range(3)]
        report("prepare again (median of 3)", sorted(again)[1])
        with ProcessPoolExecutor(1) as pool:  # what this process needs, its children are told of
            pool.submit(make_photo, paths[0], count).result()
        report("prepare, one photo changed", measure(RUN, str(photos), workspace))
        loop = report("plain loop, one thread", measure(LOOP, str(photos)))
        print(f"prepare / loop: {first / loop:.2f}")
        print(f"again / first: {statistics.median(row[0] for row in again) / first:.3f}")


def report(name: str, row: tuple[float, float, int]) -> float:
    """Print a measurement and return its seconds."""
    seconds, peak, made = row
    print(f"{name:30} {seconds:8.2f} s  {peak:6.0f} MB  {made} pictures", flush=True)
    return seconds


if __name__ == "__main__":
    main()
