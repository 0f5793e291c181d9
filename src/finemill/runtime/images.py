"""The two images that steps run in, by role. `finemill compile --image-cpu`, `--image-train` put others in place."""

from finemill import __version__

IMAGES = {"cpu": f"finemill-cpu:{__version__}", "train": f"finemill-train:{__version__}"}
