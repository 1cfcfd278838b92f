from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from colabtools import drive, env
from colabtools.dreambooth.session import Session, create_session

pytest.importorskip("ipywidgets")


@pytest.fixture(autouse=True)
def _no_forms_left() -> Iterator[None]:
    """The forms of a test are closed: ipywidgets keeps each one otherwise."""
    import ipywidgets

    yield
    ipywidgets.Widget.close_all()


@pytest.fixture
def workspace(tmp_path: Path) -> drive.Workspace:
    return drive.open_local(tmp_path / "work space")


@pytest.fixture
def session(workspace: drive.Workspace) -> Session:
    """A session of ten pictures, the first two with captions."""
    session = create_session(workspace, "dog")
    session.instance_images_dir.mkdir()
    session.captions_dir.mkdir()
    for number in range(10):
        name = f"photo {number}.png"
        color = (25 * number, 80, 200)
        Image.new("RGB", (64, 48), color).save(session.instance_images_dir / name)
    (session.captions_dir / "photo 0.txt").write_text("a photo of sks dog\n")
    (session.captions_dir / "photo 1.txt").write_text("sks dog, sitting\n")
    return session


@pytest.fixture
def jupyter() -> env.Probes:
    """Answers of a kernel behind somebody's JupyterLab."""
    return env.Probes(environ={"JPY_SESSION_NAME": "a.ipynb"}, in_zmq_kernel=lambda: True)


@pytest.fixture
def papermill() -> env.Probes:
    """Answers of a kernel that a program runs."""
    return env.Probes(environ={}, in_zmq_kernel=lambda: True)
