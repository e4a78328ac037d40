"""Parts of an attention module, and the module that puts them in a row."""

from polyhead.nn.attention import MultiHeadAttention
from polyhead.nn.attentive_experts import BlockCoordinates
from polyhead.nn.auxiliary import AuxiliaryLosses, auxiliary_losses
from polyhead.nn.broadcast import ContextBroadcast, context_broadcast
from polyhead.nn.contract import AttentionModule
from polyhead.nn.cost import Cost
from polyhead.nn.hardware import HARDWARE, Hardware
from polyhead.nn.head_mask import HeadMask, head_importance
from polyhead.nn.hyper_attention import hyper_attention
from polyhead.nn.kv_cache import ContextCache, FixedCache, GrowingCache, Kept, KeyValueCache, WindowCache
from polyhead.nn.landmarks import insert_landmarks, is_landmark, without_landmarks
from polyhead.nn.latent_projection import LatentProjection
from polyhead.nn.layer_router import LayerRouter, TargetPenalty
from polyhead.nn.packing import Packed, pack, unpack
from polyhead.nn.part_module import PartModule
from polyhead.nn.positions import (
    AlibiPosition,
    DynamicNtk,
    LinearScaling,
    Llama3Scaling,
    LongRope,
    NoPosition,
    Position,
    PositionModule,
    ProportionalScaling,
    Rope,
    RopeScaling,
    Sinusoidal,
    Yarn,
    alibi_position,
    no_position,
    rope,
    rope_from_parameters,
    sinusoidal,
)
from polyhead.nn.projections import OutputProjection, Projection
from polyhead.nn.regularizers import (
    AttentionDiversification,
    DropHead,
    Regularizer,
    TokenMasking,
    attention_diversification,
    drop_head,
    shifted_groups,
    token_masking,
    v_schedule,
)
from polyhead.nn.stack import AttentionStack, StackCache

__all__ = [
    "HARDWARE",
    "AlibiPosition",
    "AttentionDiversification",
    "AttentionModule",
    "AttentionStack",
    "AuxiliaryLosses",
    "BlockCoordinates",
    "ContextBroadcast",
    "ContextCache",
    "Cost",
    "DropHead",
    "DynamicNtk",
    "FixedCache",
    "GrowingCache",
    "Hardware",
    "HeadMask",
    "Kept",
    "KeyValueCache",
    "LatentProjection",
    "LayerRouter",
    "LinearScaling",
    "Llama3Scaling",
    "LongRope",
    "MultiHeadAttention",
    "NoPosition",
    "OutputProjection",
    "Packed",
    "PartModule",
    "Position",
    "PositionModule",
    "Projection",
    "ProportionalScaling",
    "Regularizer",
    "Rope",
    "RopeScaling",
    "Sinusoidal",
    "StackCache",
    "TargetPenalty",
    "TokenMasking",
    "WindowCache",
    "Yarn",
    "alibi_position",
    "attention_diversification",
    "auxiliary_losses",
    "context_broadcast",
    "drop_head",
    "head_importance",
    "hyper_attention",
    "insert_landmarks",
    "is_landmark",
    "no_position",
    "pack",
    "rope",
    "rope_from_parameters",
    "shifted_groups",
    "sinusoidal",
    "token_masking",
    "unpack",
    "v_schedule",
    "without_landmarks",
]
