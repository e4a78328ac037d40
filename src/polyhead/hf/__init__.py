"""The bridge to Hugging Face transformers: models that Polyhead looks into and acts on.

Nothing here imports transformers before it is used.
"""

from polyhead.hf.attachment import Attachment, attach
from polyhead.hf.call import Call, Handler, LayerInfo
from polyhead.hf.handles import KVHandle
from polyhead.hf.layer_routing import LayerRouters, LayerRouting, layer_routers, routed_layers
from polyhead.hf.loading import Loaded, load
from polyhead.hf.long_heads import long_heads
from polyhead.hf.selecting import sparse

__all__ = [
    "Attachment",
    "Call",
    "Handler",
    "KVHandle",
    "LayerInfo",
    "LayerRouters",
    "LayerRouting",
    "Loaded",
    "attach",
    "layer_routers",
    "load",
    "long_heads",
    "routed_layers",
    "sparse",
]
