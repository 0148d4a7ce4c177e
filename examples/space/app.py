"""The page as a Hub Space: `diffusers-svi app`, set up by the variables of the Space."""

import os
import shlex
from pathlib import Path

from diffusers_svi.cli.app import app


storage = Path("/data")
folder = os.environ.get("SVI_FOLDER", str(storage / "films") if storage.is_dir() else "films")
options = ["--folder", folder, "--host", "0.0.0.0", "--port", os.environ.get("GRADIO_SERVER_PORT", "7860")]
for name in ("preset", "model", "lora"):
    if value := os.environ.get(f"SVI_{name.upper()}"):
        options += [f"--{name}", value]
app([*options, *shlex.split(os.environ.get("SVI_OPTIONS", ""))])
