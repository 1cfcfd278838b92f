"""Render the five pictures of the demo's subject, with captions, into colabtools/micro/subject."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from colabtools.micro import subject_path, world


def main() -> None:
    folder = subject_path()
    folder.mkdir(exist_ok=True)
    for seed, background in enumerate(world.BACKGROUNDS):
        world.render_subject(background, seed=seed).save(folder / f"{seed + 1}.png", optimize=True)
        caption = f"a {world.SUBJECT_TOKEN} star on a {background} background\n"
        (folder / f"{seed + 1}.txt").write_text(caption, encoding="utf-8")


if __name__ == "__main__":
    main()
