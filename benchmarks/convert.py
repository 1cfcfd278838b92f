"""Convert full-size random models: us, `cp` of the same bytes, and two routes through diffusers.

    python benchmarks/convert.py [--model sd15] [--place DIR]... [--rounds 5] [--arms cp,file,...]

Every arm runs in a process of its own, the arms interleaved round by round, into a name that is not
there yet, with the source in the page cache. Measured from outside: wall time, CPU time of all
threads, largest resident and largest anonymous memory. Ratios are of medians, against `cp` of the
same weight files. Our arms flush to the disk before they end and `cp` does not, so `cp+sync`, which
does, stands beside it.

The script route does what diffusers' scripts/convert_diffusers_to_original_*.py do: load the weight
files of the parts, rename and join their tensors, save one file. The library route is
`from_single_file` and `save_pretrained`.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from colabtools import micro
from colabtools.checkpoints.convert import ConvertConfig, convert
from colabtools.checkpoints.description import Description
from colabtools.checkpoints.folder_files import made_texts
from colabtools.checkpoints.headers import TensorEntry, encode_safetensors_header
from colabtools.checkpoints.keymaps.families import FAMILIES, FamilyMap, Part
from colabtools.checkpoints.plan import plan_folder
from colabtools.checkpoints.sources import Tensor
from colabtools.report import set_quiet

MODELS = {"sd15": "sd1", "sdxl": "sdxl"}
# What each arm begins with: the folder, the folder in fp32, or the single file.
ARMS = {
    "cp": "folder",
    "cp+sync": "folder",
    "file": "folder",
    "file unverified": "folder",
    "ckpt": "folder",
    "ckpt unverified": "folder",
    "script file": "folder",
    "script ckpt": "folder",
    "back": "file",
    "back unverified": "file",
    "library back": "file",
    "half": "folder32",
    "half unverified": "folder32",
    "script half": "folder32",
}
USUAL = [arm for arm, source in ARMS.items() if source != "folder32"]


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    wall_s: float
    cpu_s: float
    resident_mb: float
    anonymous_mb: float


def single_tensors(part: Part) -> dict[str, Tensor]:
    """Return the tensors of a part as published, by the names of the single file, without bytes."""
    nowhere = Path(os.devnull)
    tensors: dict[str, Tensor] = {}
    for row in part.rows:
        shape = tuple(sizes[0] for sizes in row.shape)
        tensors[row.name] = TensorEntry(row.name, "F16", shape, nowhere, 0, 2 * math.prod(shape))
    return tensors


def make_model(family: FamilyMap, folder: Path, code: str) -> int:
    """Write a random model as diffusers would, names sorted; return the length of its weights."""
    import numpy as np

    kind, size = {"F16": ("float16", 2), "F32": ("float32", 4)}[code]
    pool = np.random.default_rng(0).standard_normal(1 << 23).astype(kind).tobytes()
    total, at = 0, 0
    for part in family.parts:
        place = folder / part.name
        place.mkdir(parents=True)
        planned = plan_folder(family, {part.name: single_tensors(part)})[part.name]
        shapes = {target.name: target.shape for target in planned}
        rows = [(name, code, shapes[name]) for name in sorted(shapes)]
        with (place / f"{part.stem}.safetensors").open("wb") as file:
            file.write(encode_safetensors_header(rows, {"format": "pt"}))
            for _, _, shape in rows:
                left = math.prod(shape) * size
                while left:
                    chunk = pool[at : at + left]
                    file.write(chunk)
                    left -= len(chunk)
                    at = (at + len(chunk) + 4) % (len(pool) - 8)
            total += file.tell()
    description = Description(family=family.name, prediction_type="epsilon")
    parts = {part.name: single_tensors(part) for part in family.parts}
    for name, text in made_texts(family, description, parts).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text)
    for name in ("tokenizer", "tokenizer_2")[: len(family.parts) - 2]:
        shutil.copytree(micro.sd_path() / "tokenizer", folder / name)
    return total


def weight_files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*/*.safetensors"))


def run_script(src: Path, dst: Path, *, half: bool) -> None:
    """Convert through state dicts in memory."""
    import torch
    from safetensors.torch import load_file, save_file

    family = FAMILIES["sdxl" if (src / "text_encoder_2").is_dir() else "sd1"]
    state: dict[str, torch.Tensor] = {}
    for part in family.parts:
        loaded = load_file(src / part.name / f"{part.stem}.safetensors", device="cpu")
        for row in part.rows:
            pieces = [loaded[segment.name] for segment in row.segments]
            tensor = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            if row.segments[0].squeeze:
                tensor = tensor.reshape(*tensor.shape, 1, 1)
            if row.segments[0].transpose:
                tensor = tensor.t().contiguous()
            state[part.prefix + row.name] = tensor
    if half:
        state = {name: tensor.half() for name, tensor in state.items()}
    if dst.suffix == ".ckpt":
        torch.save({"state_dict": state}, dst)
    else:
        save_file(state, dst)


def run_library(src: Path, dst: Path, config: Path) -> None:
    """Load the single file as a pipeline, and save that."""
    import diffusers
    import torch

    name = "StableDiffusionXLPipeline" if "sdxl" in config.name else "StableDiffusionPipeline"
    pipeline = getattr(diffusers, name).from_single_file(
        str(src), config=str(config), local_files_only=True, torch_dtype=torch.float16
    )
    pipeline.save_pretrained(dst)


def run_arm(arm: str, src: Path, dst: Path, config: Path) -> None:
    """Do what an arm is, in this process."""
    set_quiet(True)
    if arm.startswith("script"):
        run_script(src, dst, half=arm.endswith("half"))
    elif arm.startswith("library"):
        run_library(src, dst, config)
    else:
        dtype = "fp16" if arm.startswith("half") else "keep"
        verify = not arm.endswith("unverified")
        convert(src, dst, ConvertConfig(dtype=dtype, verify=verify, config_from=str(config)))


def command(arm: str, src: Path, dst: Path, config: Path) -> list[str]:
    if arm.startswith("cp"):
        dst.mkdir()
        # The files of two text encoders have one name.
        copies = [f'cp "{file}" "{dst / str(n)}"' for n, file in enumerate(weight_files(src))]
        flush = [f'sync "{dst}"/*'] if arm.endswith("sync") else []
        return ["sh", "-c", " && ".join([*copies, *flush])]
    return [sys.executable, __file__, "--arm", arm, str(src), str(dst), str(config)]


def measure(argv: list[str]) -> Cost:
    """Run a child, watching its memory from outside."""
    began = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = {"RssAnon:": 0, "VmHWM:": 0}
    watcher = threading.Thread(target=_watch, args=(child.pid, peaks))
    watcher.start()
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = time.perf_counter() - began
    watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.stderr is not None
    error = child.stderr.read().decode(errors="replace")
    child.stderr.close()
    if child.returncode:
        raise SystemExit(f"{argv[:4]} failed: {error[-500:]}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Cost(wall_s, cpu_s, peaks["VmHWM:"] / 1024, peaks["RssAnon:"] / 1024)


def _watch(pid: int, peaks: dict[str, int]) -> None:
    """Keep the largest values in kB until the process is gone."""
    while True:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        for line in text.splitlines():
            name, _, value = line.partition("\t")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
        if "VmHWM:" not in text:
            return
        time.sleep(0.01)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def compare(place: Path, model: str, rounds: int, arms: list[str]) -> None:
    """Print a table of the arms for one model in one place."""
    family = FAMILIES[MODELS[model]]
    with tempfile.TemporaryDirectory(dir=place, prefix="convert-") as temporary:
        root = Path(temporary)
        sources = {"folder": root / model}
        size = make_model(family, sources["folder"], "F16")
        needed = {ARMS[arm] for arm in arms}
        if "folder32" in needed:
            sources["folder32"] = root / f"{model}-fp32"
            make_model(family, sources["folder32"], "F32")
        if "file" in needed:
            set_quiet(True)
            sources["file"] = convert(sources["folder"], root / f"{model}.safetensors").path
        print(f"\n{model}, {size / 1e9:.2f} GB, {place}, {rounds} rounds, load {os.getloadavg()}")
        costs: dict[str, list[Cost]] = {arm: [] for arm in arms}
        for _ in range(rounds):
            for arm in arms:
                ending = ".ckpt" if "ckpt" in arm else ".safetensors"
                folder = "cp" in arm or "back" in arm
                dst = root / ("out" if folder and "ckpt" not in arm else f"out{ending}")
                src = sources[ARMS[arm]]
                os.sync()
                costs[arm].append(measure(command(arm, src, dst, sources["folder"])))
                remove(dst)
        report(costs)


def report(costs: dict[str, list[Cost]]) -> None:
    first = next(iter(costs.values()))
    base_wall = statistics.median(cost.wall_s for cost in first)
    base_cpu = statistics.median(cost.cpu_s for cost in first)
    print(
        "| arm | wall s | least | x cp | least/least | CPU s | x cp | resident MB | anonymous MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for arm, each in costs.items():
        walls = [cost.wall_s for cost in each]
        wall, cpu = statistics.median(walls), statistics.median(cost.cpu_s for cost in each)
        least = min(walls) / min(cost.wall_s for cost in first)
        resident = max(cost.resident_mb for cost in each)
        anonymous = max(cost.anonymous_mb for cost in each)
        print(
            f"| {arm} | {wall:.2f} | {min(walls):.2f} | {wall / base_wall:.2f} | {least:.2f} "
            f"| {cpu:.2f} | {cpu / base_cpu:.2f} | {resident:.0f} | {anonymous:.0f} |"
        )


def main() -> None:
    if sys.argv[1:2] == ["--arm"]:
        arm, src, dst, config = sys.argv[2:]
        run_arm(arm, Path(src), Path(dst), Path(config))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--place", type=Path, action="append", help="folder to work in")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(USUAL))
    args = parser.parse_args()
    arms = args.arms.split(",")
    shm = Path("/dev/shm")
    for place in args.place or [*([shm] if shm.is_dir() else []), Path(tempfile.gettempdir())]:
        compare(place, args.model, args.rounds, arms)


if __name__ == "__main__":
    main()
