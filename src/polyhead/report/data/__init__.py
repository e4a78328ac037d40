"""Everything that a report says, as data.

`report.json` is a `ReportData`, and `report.html` is drawn from nothing else: whatever the page shows can be
read, checked and compared here.
"""

from polyhead.report.data.heads import ROLES, Condition, Lookups, Measurement, Pictures, RoleRule, Roles
from polyhead.report.data.savings import Point, Recommendation, Savings
from polyhead.report.data.whole import FORMAT, MAX_TOKENS, Model, Phase, ReportData, Run, Text

__all__ = [
    "FORMAT",
    "MAX_TOKENS",
    "ROLES",
    "Condition",
    "Lookups",
    "Measurement",
    "Model",
    "Phase",
    "Pictures",
    "Point",
    "Recommendation",
    "ReportData",
    "RoleRule",
    "Roles",
    "Run",
    "Savings",
    "Text",
]
