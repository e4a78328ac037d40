"""KV caches for pretrained models whose heads keep different numbers of tokens.

    cache = per_head(model, full=profile["retrieval"].by_kv_head().top(0.2), sink=4, window=256)
    model.generate(**inputs, past_key_values=cache)

`duo` and `razor` are two ways of finding the heads that need the whole context, `spans` finds how far each
head has to look, and makes a cache of it. `flux` trains routers that let whole layers look at little, and
keeps what they read. Nothing here imports transformers before it is used.
"""

from polyhead.cache import duo, flux, razor, spans
from polyhead.cache.per_head import per_head

__all__ = ["duo", "flux", "per_head", "razor", "spans"]
