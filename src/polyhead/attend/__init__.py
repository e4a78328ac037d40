"""The operator on q, k, v and the languages that describe it."""

from polyhead.attend.function import attend, explain, observe
from polyhead.attend.plan import Plan, strict
from polyhead.attend.tile import Tile
from polyhead.attend.tiles import Consumer

__all__ = ["Consumer", "Plan", "Tile", "attend", "explain", "observe", "strict"]
