"""Reports of models that do not exist: every role, pictures and lookups that look as a real head's do."""

from __future__ import annotations

import numpy as np

from polyhead.report.data import (
    Condition,
    Measurement,
    Model,
    Phase,
    Point,
    Recommendation,
    ReportData,
    RoleRule,
    Roles,
    Run,
    Savings,
    Text,
)
from polyhead.report.packing import lookup_queries, pack_lookups, pack_pictures, picture_side

PROSE = "The cache keeps what every head has read before , so that a later token may look back at it"
WORDS = PROSE.split()
NASTY = (
    "</script>",
    "<!--",
    '"',
    "'",
    "&amp;",
    "\u2028",
    "\u2029",
    "\u202e",
    "\x00",
    "\x1b",
    "\ud83d",
    "😀",
    "\n",
    "\t",
    "",
    "日本",
    "<img src=x onerror=alert(1)>",
    "${x}",
    "\\",
)

MEASURES = (
    ("sink", "Sink mass", "share", "higher: rests on the first token"),
    ("found_sink", "Found-sink mass", "share", ""),
    ("entropy", "Entropy", "bits", "higher: spreads wider"),
    ("distance", "Mean distance", "tokens", "higher: looks further back"),
    ("window", "Window mass", "share", "higher: stays near"),
    ("previous_token", "Previous-token mass", "share", ""),
    ("next_token", "Next-token mass", "share", ""),
    ("duplicate", "Duplicate-token mass", "share", ""),
    ("induction", "Induction mass", "share", ""),
    ("concentration", "Received concentration", "share", ""),
    ("largest_logit", "Largest logit", "", ""),
    ("output_share", "Output norm share", "share", ""),
    ("retrieval", "Retrieval score", "share", "higher: copies facts from far away"),
    ("retrieval_mass", "Retrieval by mass", "share", ""),
)
RULES = (
    RoleRule("retrieval", "Copies a hidden fact.", (Condition("retrieval", ">=", 0.1),)),
    RoleRule("induction", "Continues what it has seen.", (Condition("induction", ">=", 0.2),)),
    RoleRule("previous token", "Looks one back.", (Condition("previous_token", ">=", 0.4),)),
    RoleRule("sink", "Rests on the first token.", (Condition("sink", ">=", 0.6),)),
    RoleRule("local", "Stays near.", (Condition("window", ">=", 0.6), Condition("sink", "<=", 0.3))),
    RoleRule("broad", "Spreads.", (Condition("entropy", ">=", 5.0),)),
    RoleRule("mixed", "None of the rules above."),
)
SHARES = {
    "sink": 0.34,
    "local": 0.2,
    "previous token": 0.06,
    "induction": 0.06,
    "retrieval": 0.06,
    "broad": 0.1,
    "mixed": 0.18,
}


def _patterns(role: str, queries: np.ndarray, rng: np.random.Generator, k: int):
    """Attended positions and weights `(q, k)` as a head of this role has them."""
    q = queries[:, None]
    near = q - rng.integers(0, 12, (queries.size, k))
    far = (rng.random((queries.size, k)) * (q + 1)).astype(np.int64)
    base = np.sort(rng.dirichlet(np.ones(k + 1), queries.size)[:, :k])[:, ::-1]
    positions = (far if role in ("broad", "retrieval", "induction") else near).copy()
    positions[:, 1] = 0
    if role == "previous token":
        positions[:, 0] = queries - 1
    weights = base.copy()
    if role == "sink":
        weights[:, 1], weights[:, 0] = base[:, 0], base[:, 1]
    if role == "broad":
        weights *= 0.15
    weights[positions < 0] = 0
    return np.maximum(positions, 0), weights


def _picture(role: str, side: int, rng: np.random.Generator, causal: bool) -> np.ndarray:
    r, c = np.indices((side, side))
    distance = np.abs(r - c)
    mass = {
        "sink": 8.0 * (c == 0) + 0.02 * rng.random((side, side)),
        "local": np.exp(-distance / 1.5),
        "previous token": 1.0 * (distance == 0) + 0.15 * (r - c == 1),
        "broad": 0.5 + rng.random((side, side)),
        "mixed": np.exp(-distance / 6) + 1.5 * (c == 0) + 0.05,
    }.get(role, 2.0 * (c == 0) + rng.random((side, side)) ** 12 * 4 + 0.01)
    if causal:
        mass = np.where(c <= r, mass, 0)
    return mass / mass.sum(1, keepdims=True)


def _values(name: str, roles: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    strong = {"sink": "sink", "found_sink": "sink", "window": "local", "previous_token": "previous token"}
    strong |= {"induction": "induction", "retrieval": "retrieval", "retrieval_mass": "retrieval"}
    if name == "entropy":
        return np.where(roles == "broad", rng.uniform(5, 9, roles.size), rng.uniform(0.3, 4.9, roles.size))
    if name == "distance":
        return rng.gamma(1.2, 180, roles.size)
    if name == "largest_logit":
        return rng.normal(18, 6, roles.size) + 150 * (rng.random(roles.size) > 0.995)
    low = rng.beta(1, 14, roles.size)
    return np.where(roles == strong.get(name, "-"), rng.uniform(0.45, 0.95, roles.size), low)


def _savings(model: Model, rng: np.random.Generator) -> tuple[Savings, Recommendation]:
    total = model.total_kv_heads
    order = [(layer, g) for layer, n in enumerate(model.kv_heads) for g in range(n)]
    rng.shuffle(order)
    order = [tuple(map(int, pair)) for pair in order]

    def point(
        policy: str, fraction: float, accuracy: float, perplexity: float, seed: int | None = None
    ) -> Point:
        held = tuple((n, int(n * 46080 * (fraction + (1 - fraction) * 260 / n))) for n in (2048, 8192))
        kept = round(fraction * total)
        speed = 9 + 17 * (1 - fraction) ** 1.6
        heads = tuple(order[:kept]) if policy == "retrieval" else ()
        return Point(
            policy,
            fraction,
            kept,
            seed,
            accuracy,
            40,
            perplexity,
            held,
            speed,
            heads,
            40,
            round(40 * accuracy),
        )

    points = []
    for f in (1.0, 0.75, 0.5, 0.35, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0):
        accuracy = 1.0 if f >= 0.2 else {0.15: 0.95, 0.1: 0.775, 0.05: 0.35, 0.0: 0.0}[f]
        points.append(point("retrieval", f, accuracy, 14.8 + 3.4 * (1 - f) ** 3))
        if 0 < f < 1:
            for seed in (0, 1, 2):
                chance = max(0.0, f**2.5 + rng.normal(0, 0.06))
                points.append(
                    point("random", f, min(1, chance), 14.8 + 6 * (1 - f) ** 2 + rng.random(), seed)
                )
    baseline = point("full", 1.0, 1.0, 14.8)
    chosen = next(p for p in points if p.policy == "retrieval" and p.kv_fraction == 0.2)
    python = (
        "import polyhead as ph\n\n"
        'model, tokenizer = ph.hf.load("smollm2")\n'
        "cache = ph.cache.per_head(\n"
        f"    model, full={list(chosen.heads[:4])}, sink=4, window=256,\n"
        ")\n"
        "model.generate(**inputs, past_key_values=cache)\n"
    )
    savings = Savings(
        baseline,
        tuple(points),
        "Hidden facts: 40 needles at 1,024 and 2,048 tokens, five depths.",
        "Perplexity: 4 stretches of 2,048 held-out tokens.",
        "Decoding: greedy, one sequence, at 8,192 tokens of context.",
        python="import polyhead as ph\n\nranked = [(0, 0), (0, 1)]\nfull = ranked[:1]\n",
    )
    why = "The smallest cache that finds every hidden fact and keeps perplexity within 15 %."
    how = "Measured on texts, needles and seeds that were not used to choose the heads."
    return savings, Recommendation(baseline, chosen, why, python, how)


def report(
    *,
    layers: int = 30,
    heads: int = 9,
    kv_heads: int = 3,
    tokens: int = 2048,
    encoder: bool = False,
    nasty: bool = False,
    seed: int = 0,
    k: int = 4,
    name: str = "SmolLM2-135M-Instruct",
) -> ReportData:
    """A report of a model of this shape, the same for the same seed."""
    rng = np.random.default_rng(seed)
    shares = {r: s for r, s in SHARES.items() if not (encoder and r in ("retrieval", "induction"))}
    p = np.array(list(shares.values()))
    roles = rng.choice(np.array(list(shares)), (layers, heads), p=p / p.sum())
    model = Model(
        name, "LlamaForCausalLM", 134_515_008, 64, (heads,) * layers, (kv_heads,) * layers, encoder, "float32"
    )
    strings = [("" if i % 17 == 0 else " ") + WORDS[i % len(WORDS)] for i in range(tokens)]
    strings = ["\n" if i % 61 == 60 else s for i, s in enumerate(strings)]
    if nasty:
        strings = [NASTY[i % len(NASTY)] if i % 3 == 0 else s for i, s in enumerate(strings)]
    received = np.r_[0.5, rng.gamma(0.5, 2e-3, tokens - 1)]
    text = Text("a page of prose", tuple(strings), (0,), tuple(received.tolist()))
    names = [m for m in MEASURES if not (encoder and m[0].startswith("retrieval"))]
    measurements = tuple(
        Measurement(
            n,
            t,
            f"{t}: what it measures, in a sentence.",
            u,
            d,
            tuple(map(tuple, v.reshape(layers, heads).tolist())),
        )
        for n, t, u, d in names
        for v in [_values(n, roles.ravel(), rng)]
    )
    rules = tuple(
        r for r in RULES if all(c.measurement in {m.name for m in measurements} for c in r.conditions)
    )
    side = picture_side(layers * heads, causal=not encoder, tokens=tokens)
    pictures = [np.stack([_picture(r, side, rng, not encoder) for r in row]) for row in roles]
    queries = lookup_queries(layers * heads, tokens, k=k)
    looks = [[_patterns(r, queries, rng, k) for r in row] for row in roles]
    lookups = pack_lookups(
        queries,
        [np.stack([a for a, _ in row]) for row in looks],
        [np.stack([b for _, b in row]) for row in looks],
    )
    savings, advice = (None, None) if encoder else _savings(model, rng)
    return ReportData(
        model=model,
        text=text,
        run=Run(
            "0.1.0",
            "polyhead report smollm2",
            "2026-01-01 12:00",
            "2 CPU cores, torch 2.13",
            (0, 1, 2),
            (Phase("load", 3.1), Phase("profile", 41.0), Phase("savings", 170.4)),
        ),
        measurements=measurements,
        roles=Roles(rules, tuple(map(tuple, roles.tolist()))),
        pictures=pack_pictures(pictures, causal=not encoder),
        lookups=lookups,
        savings=savings,
        recommendation=advice,
        notes=("Accuracy comes from 40 needles: an interval of 91 to 100 % belongs to a perfect score.",),
    )
