"""finemill: raw chat data and a base model in, a tuned, evaluated, exported and registered model out."""

__version__ = "0.1.0"
