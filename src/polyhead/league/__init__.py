"""The league: mechanisms trained side by side, at one budget, on one task, with several seeds."""

from polyhead.league.compare import compare
from polyhead.league.contender import Contender, contender
from polyhead.league.plan import Plan, Rules, plan
from polyhead.league.standings import Row, Standings
from polyhead.league.tasks import TASKS, Batch, Recipe, Sizes, Task
from polyhead.league.training import Look, Outcome

__all__ = [
    "TASKS",
    "Batch",
    "Contender",
    "Look",
    "Outcome",
    "Plan",
    "Recipe",
    "Row",
    "Rules",
    "Sizes",
    "Standings",
    "Task",
    "compare",
    "contender",
    "plan",
]
