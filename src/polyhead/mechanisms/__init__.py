"""The catalogue of attention mechanisms: each a configuration with a name, and the module that it builds."""

from polyhead.mechanisms.config import AttentionConfig, GroupedConfig, MechanismConfig
from polyhead.mechanisms.facets import FACETS, Facets
from polyhead.mechanisms.flow import Flow, Step, flow_of
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import (
    CATALOGUE_SIZE,
    PATTERNS,
    Catalog,
    Entry,
    Registry,
    build,
    catalog,
    configure,
    entry,
    register,
)
from polyhead.mechanisms.stack import StackConfig, build_stack

__all__ = [
    "CATALOGUE_SIZE",
    "FACETS",
    "PATTERNS",
    "AttentionConfig",
    "Catalog",
    "Entry",
    "Facets",
    "Flow",
    "GroupedConfig",
    "MechanismConfig",
    "Promises",
    "Registry",
    "StackConfig",
    "Step",
    "build",
    "build_stack",
    "catalog",
    "configure",
    "entry",
    "flow_of",
    "register",
]
