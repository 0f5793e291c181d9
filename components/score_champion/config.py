"""Configuration of `score-champion`: whose champion is scored."""

from finemill.registry.config import RegisterConfig as RegisterConfig
