"""Names of the inputs and outputs that are more than a name."""

BASE_MODEL = "base_model"
"""The one input that is not written by a step: a model reference, resolved by `models/base/resolve.py`."""
