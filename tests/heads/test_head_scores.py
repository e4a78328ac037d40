import json
import math

import numpy as np
import pytest
import torch

from polyhead.errors import ConfigError, MissingExtra, ShapeError
from polyhead.head_scores import Heads, HeadScores

NAN = math.nan


@pytest.fixture
def scores():
    return HeadScores(
        ([0.1, 0.9, 0.5, 0.3], [0.9, NAN]), "demo", "a demo", "share", "higher: more", kv_groups=(2, 2)
    )


def test_values_by_layer_and_head(scores):
    assert scores[0, 1] == 0.9
    assert scores[1, 0] == 0.9
    assert scores[0].tolist() == [0.1, 0.9, 0.5, 0.3]
    assert scores.widths == (4, 2)
    assert len(scores) == 6
    assert scores.pairs[4] == (1, 0)
    assert np.isnan(scores.flat[5])


def test_takes_tensors_and_keeps_a_copy_that_nobody_writes():
    row = torch.tensor([1.0, 2.0], requires_grad=True)
    scores = HeadScores((row,))
    with torch.no_grad():
        row += 1
    assert scores[0].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        scores[0][0] = 3.0


def test_top_is_ordered_breaks_ties_by_place_and_never_takes_nan(scores):
    assert list(scores.top(3)) == [(0, 1), (1, 0), (0, 2)]
    assert list(scores.bottom(2)) == [(0, 0), (0, 3)]
    assert list(scores.top(5))[-1] == (0, 0)
    assert list(scores.above(0.5)) == [(0, 1), (1, 0), (0, 2)]
    assert list(scores.below(0.5)) == [(0, 0), (0, 3)]
    assert not scores.top(0)


def test_an_int_is_a_number_and_a_float_a_share(scores):
    assert len(scores.top(1)) == 1
    assert len(scores.top(0.5)) == 3
    assert len(HeadScores((range(10),)).top(1.0)) == 10
    assert len(HeadScores((range(10),)).top(np.int64(4))) == 4
    assert len(HeadScores((range(10),)).top(0.25)) == 3  # rounded half up


@pytest.mark.parametrize("amount", [-1, 6, 1.5, -0.1, NAN, True, "3", None])
def test_impossible_amounts_are_refused(scores, amount):
    with pytest.raises(ConfigError):
        scores.top(amount)


def test_messages_name_what_is_wrong(scores):
    with pytest.raises(ConfigError, match="demo has a value for 5 of its 6 heads; asked for 6"):
        scores.top(6)
    with pytest.raises(ConfigError, match=r"share of the heads must be between 0 and 1, got 1\.5"):
        scores.top(1.5)
    with pytest.raises(ConfigError, match="2 layers of 2 to 4 heads"):
        scores[2, 0]
    with pytest.raises(ShapeError, match=r"layer 1 must be one number a head \(H,\), got shape \(1, 2\)"):
        HeadScores(([1.0], [[1.0, 2.0]]))
    with pytest.raises(ShapeError, match="layer 0 has 4, got 3"):
        HeadScores((np.zeros(4),), kv_groups=(3,))
    with pytest.raises(ShapeError, match=r"one number per layer, 1; got 2"):
        HeadScores((np.zeros(4),), kv_groups=(1, 1))


def test_arithmetic(scores):
    doubled = scores + scores
    assert doubled[0, 1] == 1.8
    assert doubled.unit == "share"
    assert (scores * scores).unit == ""
    assert (1 - scores)[0, 0] == pytest.approx(0.9)
    assert (2 / scores)[0, 2] == 4.0
    assert (scores / 2)[0, 1] == 0.45
    assert (-scores)[0, 0] == -0.1
    assert (scores - 0.1)[0, 0] == 0
    assert (1 - scores).name == "1 - demo"
    assert np.isnan(doubled[1, 1])
    assert HeadScores.mean([scores, scores * 3])[0, 0] == pytest.approx(0.2)
    assert scores.map(np.sqrt)[0, 1] == pytest.approx(math.sqrt(0.9))


def test_arithmetic_of_different_models_is_refused(scores):
    other = HeadScores((np.zeros(4),), "other")
    with pytest.raises(ShapeError, match="demo and other are scores of different heads: 2 layers of 2 to 4"):
        scores + other
    with pytest.raises(ShapeError, match="different heads"):
        HeadScores.mean([scores, other])
    with pytest.raises(TypeError):
        scores + "a"
    with pytest.raises(ConfigError, match="no scores"):
        HeadScores.mean([])


def test_rank_and_correlation():
    a = HeadScores(([1.0, 2.0, 2.0], [4.0, NAN]))
    assert a.rank().flat[:4].tolist() == [4.0, 2.5, 2.5, 1.0]
    assert np.isnan(a.rank()[1, 1])
    squared = a.map(np.square)
    assert a.correlation(squared) == pytest.approx(1.0)
    assert a.correlation(squared, "pearson") < 1.0
    assert a.correlation(-a) == pytest.approx(-1.0)
    assert math.isnan(a.correlation(a * 0))
    with pytest.raises(ConfigError, match="method must be 'spearman' or 'pearson', got 'kendall'"):
        a.correlation(a, "kendall")


def test_spearman_uses_only_heads_that_both_have():
    a = HeadScores(([1.0, 2.0, 3.0, NAN],))
    b = HeadScores(([1.0, 2.0, NAN, 0.0],))
    assert a.correlation(b) == pytest.approx(1.0)


def test_by_kv_head(scores):
    best = scores.by_kv_head()
    assert [v.tolist() for v in best.values] == [[0.9, 0.5], [0.9]]
    assert best.level == "kv"
    assert scores.by_kv_head("mean")[0].tolist() == [0.5, 0.4]
    assert scores.by_kv_head("mean")[1].tolist() == [0.9]  # the undefined head is passed over
    assert np.isnan(HeadScores(([NAN, NAN],), kv_groups=(2,)).by_kv_head()[0, 0])
    with pytest.raises(ConfigError, match="set kv_groups"):
        HeadScores(([1.0],)).by_kv_head()
    with pytest.raises(ConfigError, match="reduce must be 'max' or 'mean', got 'sum'"):
        scores.by_kv_head("sum")


def test_heads_of_key_values(scores):
    assert scores.top(3).kv_heads() == Heads(((0, 0), (0, 1), (1, 0)), "kv")
    assert scores.top(3).kv_heads().level == "kv"
    assert scores.by_kv_head().top(1).kv_heads().level == "kv"
    with pytest.raises(ConfigError, match="give kv_groups"):
        Heads(((0, 0),)).kv_heads()


def test_heads_are_an_ordered_set(scores):
    a, b = scores.top(3), scores.bottom(3)
    assert a & b == {(0, 2)}
    assert list(a - b) == [(0, 1), (1, 0)]
    assert (a | b).kv_groups == (2, 2)
    assert a == Heads(tuple(reversed(a.pairs)))
    assert hash(a) == hash(Heads(tuple(reversed(a.pairs))))
    assert (0, 1) in a
    assert a[0] == (0, 1)
    assert a.by_layer() == {0: (1, 2), 1: (0,)}
    assert len(Heads(((0, 1), (0, 1)))) == 1
    assert repr(a) == "Heads(3 heads: 0.1, 1.0, 0.2)"
    with pytest.raises(ConfigError, match="counted from 0"):
        Heads(((0, -1),))


def test_json_round_trip_with_what_json_cannot_say(scores):
    strange = HeadScores(([1.0, math.inf], [-math.inf, NAN]), "s", kv_groups=(1, 2))
    for s in (scores, strange):
        text = json.dumps(s.to_json(), allow_nan=False)
        assert HeadScores.from_json(json.loads(text)) == s
    with pytest.raises(ConfigError, match="not head scores"):
        HeadScores.from_json({"name": "x"})


def test_equality_counts_words_and_values(scores):
    assert scores == HeadScores.from_json(scores.to_json())
    assert scores != scores.renamed("other")
    assert scores != scores + 0
    assert scores.renamed("other", unit="nats").unit == "nats"


def test_repr_says_what_is_there(scores):
    expected = (
        "HeadScores('demo', 2 layers, 6 heads, 1 undefined, 0.1 to 0.9 share; top: 0.1 0.9, 1.0 0.9, 0.2 0.5)"
    )
    assert repr(scores) == expected
    assert "none defined" in repr(HeadScores(([NAN],)))


def test_frame_and_plot(scores):
    pytest.importorskip("pandas")
    pytest.importorskip("plotly")
    frame = scores.to_frame()
    assert list(frame.columns) == ["layer", "head", "demo"]
    assert frame.iloc[4].tolist() == [1.0, 0.0, 0.9]
    heat = scores.plot().data[0]
    assert [len(row) for row in heat.z] == [4, 4]  # the narrow layer is filled up


def test_absent_extras_are_named(scores, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingExtra, match=r"polyhead\[report\]"):
        scores.to_frame()
    with pytest.raises(MissingExtra, match="plotly"):
        scores.plot()
