"""What changes attention in training only, as parts: `build("mha", ..., regularizers=drop_head(0.1))`."""

from polyhead.nn.regularizers.base import Regularizer, check_regularizers
from polyhead.nn.regularizers.diversification import AttentionDiversification, attention_diversification
from polyhead.nn.regularizers.drop_head import DropHead, drop_head, v_schedule
from polyhead.nn.regularizers.shifted_groups import ShiftedGroups, shifted_groups
from polyhead.nn.regularizers.token_masking import TokenMasking, token_masking

__all__ = [
    "AttentionDiversification",
    "DropHead",
    "Regularizer",
    "ShiftedGroups",
    "TokenMasking",
    "attention_diversification",
    "check_regularizers",
    "drop_head",
    "shifted_groups",
    "token_masking",
    "v_schedule",
]
