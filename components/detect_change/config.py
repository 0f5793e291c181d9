"""Configuration of `detect-change`: which registered model is compared with."""

from finemill.registry.config import RegisterConfig as RegisterConfig
