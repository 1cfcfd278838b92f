"""Forms below a notebook's cell: choose a session, free room, edit captions and crops.

Each is a thin view over functions that work without it. Where nobody looks, in a plain process or
a notebook that a program runs, it does its default and says so in one line. ipywidgets 7.7 and 8
both serve; they are imported only where a form is shown.
"""

from colabtools.dreambooth.widgets.captions import CaptionEditor, edit_captions
from colabtools.dreambooth.widgets.crops import CropViewer, edit_crops
from colabtools.dreambooth.widgets.rooms import SpaceManager, manage_space
from colabtools.dreambooth.widgets.sessions import SessionPicker, pick_session

__all__ = [
    "CaptionEditor",
    "CropViewer",
    "SessionPicker",
    "SpaceManager",
    "edit_captions",
    "edit_crops",
    "manage_space",
    "pick_session",
]
