"""Every measurement against its definition, written with loops over dense weights in float64."""

import numpy as np
import pytest
import torch

from heads.dense import MARKS, by_key, definition, dense_attention
from polyhead.attend.masks import causal, documents, padding, per_head, sink, window
from polyhead.attend.normalizers import sigmoid, softmax
from polyhead.attend.scores import alibi, soft_cap
from polyhead.errors import ConfigError, ShapeError, UnknownName
from polyhead.heads import MEASUREMENTS, RowMean, measure
from polyhead.heads.measurements import FoundSinks, FutureInfluence, WindowMass

B, H, G, D = 2, 4, 2, 8
LONG = 200  # several strips
left = torch.ones(B, LONG, dtype=torch.bool)
left[1, :37] = False
right = torch.ones(B, LONG, dtype=torch.bool)
right[1, -41:] = False
ids = torch.randint(0, 40, (B, LONG), generator=torch.Generator().manual_seed(5))

CASES = {
    "causal": {"mask": causal()},
    "short": {"mask": causal(), "length": 3},
    "one": {"mask": causal(), "length": 1},
    "left padding": {"mask": causal() & padding(left), "padding": left},
    "right padding": {"mask": causal() & padding(right), "padding": right},
    "window with sinks": {"mask": causal() & (window(20) | sink(2))},
    "soft cap": {"mask": causal(), "score": soft_cap(2.0)},
    "alibi": {"mask": causal(), "score": alibi(H)},
    "sink logit": {
        "mask": causal(),
        "normalizer": softmax(sink=torch.tensor([0.5, 3.0, -1.0, 6.0]).double()),
    },
    "sigmoid": {"mask": causal(), "normalizer": sigmoid(bias=-4.0)},
    "documents": {
        "mask": causal() & documents(torch.arange(LONG).div(90, rounding_mode="floor").expand(B, LONG))
    },
    "per head": {"mask": per_head([causal(), causal() & window(5), window(9), causal() & window(70)])},
    "encoder": {"kind": "encoder"},
    "padded encoder": {"kind": "encoder", "mask": padding(right), "padding": right},
    "decoding": {"mask": causal(), "queries": 50},
}


def call(name, dtype=torch.float64):
    """q, k, v and the rest of a case."""
    case = dict(CASES[name])
    length = case.pop("length", LONG)
    queries = case.pop("queries", length)
    torch.manual_seed(0)
    q = 2 * torch.randn(B, H, queries, D, dtype=dtype)
    k, v = 2 * torch.randn(B, G, length, D, dtype=dtype), torch.randn(B, G, length, 6, dtype=dtype)
    k[:, 0, : length // 3 : 40] += 0.7  # some keys that draw attention
    q[:, :2] += 0.7
    return (q, k, v), {"kind": "decoder", "ids": ids[:, :length], **case}


@pytest.fixture(scope="module", params=CASES)
def measured(request):
    (q, k, v), case = call(request.param)
    extra = {n: case[n] for n in ("mask", "score", "normalizer") if n in case}
    ours = measure(q, k, v, MEASUREMENTS, marks=MARKS, **case)
    dense = dense_attention(q, k, v, **extra)
    return request.param, case, ours, dense


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_equals_its_definition(measured, name):
    _, case, ours, (out, weights, logits, allowed) = measured
    where, x, kind = case.get("padding"), case["ids"].numpy(), case["kind"]
    if name in ("found_sinks", "concentration", "future_influence"):
        expected = by_key(name, weights, allowed, where)
    else:
        expected = definition(name, weights, logits, allowed, out, where, x, kind)
    np.testing.assert_allclose(ours[name].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_sinks_are_found_in_the_cases_at_all():
    q, k, v = (
        torch.randn(1, 2, 200, 4).double(),
        torch.randn(1, 2, 200, 4).double(),
        torch.randn(1, 2, 200, 4).double(),
    )
    k[:, 0, [0, 90]] = 0.0
    q[:, 0, :, 0] = 5.0
    k[:, 0, [0, 90], 0] = 20.0  # head 0 rests on keys 0 and 90
    found = measure(q, k, v, ["found_sinks", "sink"], mask=causal())
    assert found["found_sinks"][0] > 0.99
    assert found["sink"][0] < 0.9
    assert found["found_sinks"][1] < 0.1


def test_a_uniform_causal_head():
    zero = torch.zeros(1, 1, 257, 4).double()
    names = [n for n in MEASUREMENTS if MEASUREMENTS[n]().source is None]
    found = measure(zero, zero, zero + 1, names, mask=causal())
    rows = np.arange(1, 257)
    assert found["distance"].item() == pytest.approx(np.mean(rows / 2))
    assert found["normalized_entropy"].item() == pytest.approx(1.0)
    assert found["sink"].item() == pytest.approx(np.mean(1 / (rows + 1)))
    # FAI_s of a uniform causal head is the mean of 1/(t+1) over T(s)
    fai = [np.mean([1 / (t + 1) for t in range(max(s + 10, 1), min(s + 50, 256) + 1)]) for s in range(247)]
    assert found["future_influence"].item() == pytest.approx(np.mean(fai))
    assert found["output_share"].item() == pytest.approx(1.0)


def test_a_previous_token_head():
    x = 50 * torch.eye(65).double()[None, None]
    found = measure(
        x[:, :, 0:64], x[:, :, 1:65], x[:, :, :64], ["previous_token", "distance", "window"], mask=causal()
    )
    assert found["previous_token"].item() == pytest.approx(1.0)
    assert found["distance"].item() == pytest.approx(1.0)
    assert found["window"].item() == pytest.approx(1.0)


def test_half_precision_is_measured_in_float32():
    (q, k, v), case = call("causal", torch.bfloat16)
    ours = measure(q, k, v, ["entropy", "distance", "output_share", "largest_logit"], mask=case["mask"])
    wide = measure(
        q.double(),
        k.double(),
        v.double(),
        ["entropy", "distance", "output_share", "largest_logit"],
        mask=causal(),
    )
    for name in ours:
        torch.testing.assert_close(ours[name], wide[name], rtol=2e-3, atol=1e-3)


def test_float32_is_close_to_float64():
    (q, k, v), _ = call("causal")
    names = [n for n in MEASUREMENTS if MEASUREMENTS[n]().source is None]
    wide = measure(q, k, v, names, mask=causal())
    ours = measure(q.float(), k.float(), v.float(), names, mask=causal())
    for name in names:
        torch.testing.assert_close(ours[name], wide[name], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_parameters_are_kept_and_said():
    assert "at most 8" in WindowMass(8).describe()
    (q, k, v), _ = call("causal")
    narrow, wide = (measure(q, k, v, [WindowMass(w)], mask=causal())["window"] for w in (1, 200))
    assert (narrow < wide).all()
    assert wide.tolist() == pytest.approx([1.0] * H)
    for wrong in (
        lambda: WindowMass(-1),
        lambda: FoundSinks(0.0),
        lambda: FoundSinks(rows=0),
        lambda: FutureInfluence(5, 4),
    ):
        with pytest.raises(ConfigError, match="must"):
            wrong()


def test_output_share_through_the_projection():
    (q, k, v), _ = call("causal")
    projection = torch.randn(H, 6, 20).double()
    out, *_ = dense_attention(q, k, v, mask=causal())
    norms = np.linalg.norm(np.einsum("bhld,hde->bhle", out, projection.numpy()), axis=-1)
    expected = (norms / norms.sum(1, keepdims=True))[:, :, 1:].mean((0, 2))
    found = measure(q, k, v, ["output_share"], mask=causal(), projection=projection)["output_share"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_a_measurement_of_ones_own():
    class Twice(RowMean):
        name = "twice"

        def of(self, rows):
            return 2 * rows.on(rows.i)

    (q, k, v), _ = call("causal")
    found = measure(q, k, v, [Twice(), "own_token"], mask=causal())
    torch.testing.assert_close(found["twice"], 2 * found["own_token"])
    assert "twice" not in MEASUREMENTS
    alone = measure(q, k, v, Twice(), mask=causal())
    torch.testing.assert_close(alone["twice"], found["twice"])


def test_a_measurement_that_is_not_one_says_why():
    class Own(RowMean):
        def of(self, rows):
            return rows.on(rows.i)

    class Whole(RowMean):
        name = "whole"

        def of(self, rows):
            return rows.weights

    (q, k, v), _ = call("causal")
    with pytest.raises(ConfigError, match=r"has the class Own; write Own\(\)"):
        measure(q, k, v, [Own])
    with pytest.raises(ConfigError, match="needs a name, by which the profile calls it; give Own one"):
        measure(q, k, v, [Own()])
    with pytest.raises(ShapeError, match=r"Whole.of must give one value a row, \(b, h, r\) = \("):
        measure(q, k, v, [Whole()], mask=causal())


def test_what_cannot_be_is_refused_in_words():
    (q, k, v), _ = call("causal")
    with pytest.raises(UnknownName, match="no measurement is called 'entropie'; did you mean 'entropy'"):
        measure(q, k, v, ["entropie"])
    with pytest.raises(ConfigError, match="'entropy' twice"):
        measure(q, k, v, ["entropy", "entropy"])
    with pytest.raises(ConfigError, match="names or Measurement objects, got 3"):
        measure(q, k, v, [3])
    with pytest.raises(ShapeError, match=r"padding is \(2, 5\).*expects \(2, 200\)"):
        measure(q, k, v, ["entropy"], padding=torch.ones(2, 5, dtype=torch.bool))


def test_token_ids_are_asked_for():
    (q, k, v), _ = call("causal")
    with pytest.raises(ConfigError, match="compares tokens, and their ids are not known"):
        measure(q, k, v, ["induction"], mask=causal())
    with pytest.raises(ConfigError, match="asks where the 'needle' is, which is not known; give it in marks"):
        measure(q, k, v, ["retrieval"], mask=causal())


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_every_measurement_says_what_it_is(name):
    measurement = MEASUREMENTS[name]()
    assert measurement.name == name
    assert all((measurement.title, measurement.direction, measurement.paper))
    assert "{" not in measurement.describe()
    assert "_" in (type(measurement).__doc__ or "")  # an equation
