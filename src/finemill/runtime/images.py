"""The two images that steps run in, by role. `finemill compile --image-cpu`, `--image-train` put others in place."""

from finemill import __version__

IMAGE_VARIABLE = "FINEMILL_IMAGE"
"""Name of the image that a step runs in: as its pod names it, else as it was built."""
IMAGES = {"cpu": f"finemill-cpu:{__version__}", "train": f"finemill-train:{__version__}"}
