"""The catalogue of attention mechanisms: each a configuration with a name, and the module that it builds."""

from polyhead.mechanisms.config import AttentionConfig, MechanismConfig
from polyhead.mechanisms.registry import PATTERNS, Entry, Registry, build, catalog, entry, register

__all__ = [
    "PATTERNS",
    "AttentionConfig",
    "Entry",
    "MechanismConfig",
    "Registry",
    "build",
    "catalog",
    "entry",
    "register",
]
