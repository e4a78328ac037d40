"""Descriptions: the small frozen dataclasses that say what an attention is, and their way through JSON.

Masks, scores, normalisers, mechanism configurations are all `Part`s: values that can be compared,
hashed, printed, nested and sent through JSON.
"""

from polyhead.description.json_data import from_json, to_json
from polyhead.description.part import Part, Slot, find_parts_with, part_named

__all__ = ["Part", "Slot", "find_parts_with", "from_json", "part_named", "to_json"]
