"""Configuration of `register`."""

from finemill.registry.config import RegisterConfig as RegisterConfig
