import dataclasses
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from polyhead.heads import roles as heads
from polyhead.report import curves, maps, palette, words
from polyhead.report.data import Measurement, Point, Savings
from polyhead.report.svg import Scale, printable

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("which", ["decoder", "encoder", "nasty"])
@pytest.mark.parametrize("plot", [maps.roles_file, maps.distributions_file, curves.savings_file])
def test_files_are_drawings_of_their_own(which, plot, request):
    data = request.getfixturevalue(which)
    text = plot(data)
    if text is None:
        assert data.model.is_encoder
        return
    root = ET.fromstring(text.encode())
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title").text
    assert "var(" not in text  # few viewers know CSS variables
    assert "nan" not in text.replace("nance", "")
    assert not re.search(r'(href|src)="', text)


def test_the_map_has_every_head_with_its_role(decoder):
    root = ET.fromstring(maps.roles_file(decoder).encode())
    told = [t.text for t in root.iter(f"{SVG}title") if t.text.startswith("layer ")]
    assert len(told) == decoder.model.total_heads
    assert f"layer 2, head 3: {decoder.roles.heads[2][3]}" in told


def test_curves_stand_where_the_numbers_are():
    points = tuple(
        Point("retrieval", f, int(10 * f), needle_accuracy=a, needles=20)
        for f, a in ((0, 0.0), (0.5, 0.5), (1, 1.0))
    )
    chance = tuple(Point("random", 0.5, 5, seed, needle_accuracy=a) for seed, a in ((0, 0.1), (1, 0.3)))
    savings = Savings(Point("full", 1.0, 10, needle_accuracy=1.0), points + chance)
    (chart,) = curves.savings_charts(savings, 0.5)
    root = ET.fromstring(chart.drawing)
    dots = [
        (float(c.get("cx")), float(c.get("cy")), c.find(f"{SVG}title").text.replace("\u00a0", " "))
        for c in root.iter(f"{SVG}circle")
    ]
    (x0, y0, _), (x5, y5, told), (x1, y1, _) = [d for d in dots if d[2].startswith("retrieval")]
    assert x5 == pytest.approx((x0 + x1) / 2)
    assert y5 == pytest.approx((y0 + y1) / 2)
    assert y1 < y0
    assert told.startswith("retrieval, 50 % of KV heads: 50 % (95 % interval 30 % to 70 %)")
    (random,) = [d for d in dots if d[2].startswith("random")]
    assert "20 % (10 % to 30 %, 2 seeds)" in random[2]
    assert random[1] == pytest.approx(y0 + 0.2 * (y1 - y0), abs=0.02)
    assert x0 == pytest.approx(float(root.get("data-x0")))


def test_what_was_not_measured_has_no_chart():
    savings = Savings(Point("full", 1.0, 4), (Point("retrieval", 0.5, 2, perplexity=9.0),))
    assert [c.key for c in curves.savings_charts(savings)] == ["perplexity"]


def test_a_ruined_model_does_not_flatten_the_scale():
    points = tuple(
        Point("retrieval", f, 1, perplexity=p) for f, p in ((0.0, 9000.0), (0.5, 20.0), (1.0, 15.0))
    )
    drawing = curves.savings_charts(Savings(Point("full", 1.0, 2, perplexity=15.0), points))[0].drawing
    ys = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', drawing)]
    assert abs(ys[1] - ys[2]) > 5


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    [(0.5, 20, 0.2993, 0.7007), (1.0, 10, 0.7225, 1.0), (0.0, 40, 0.0, 0.0876), (0.3, 0, 0.3, 0.3)],
)
def test_wilson(share, count, low, high):
    assert curves.wilson(share, count) == pytest.approx((low, high), abs=1e-4)


def test_a_measurement_of_nothing_and_of_one_value(decoder):
    width = decoder.model.heads[0]
    for value in (None, 0.5):
        m = Measurement("x", "X", "", "", "", ((value,) * width,) * decoder.model.layers)
        ET.fromstring(maps.distribution(m, decoder.roles))


def test_ticks_are_round_and_inside():
    assert Scale(0, 1, 0, 100).ticks(4) == [0, 0.25, 0.5, 0.75, 1.0]
    assert Scale(14.2, 21.9, 0, 100).ticks(4) == [16, 18, 20]
    assert Scale(9, 900, 0, 100, log=True).ticks() == [10, 20, 50, 100, 200, 500]
    assert Scale(3, 3, 0, 100).ticks() == [3]
    assert Scale(3, 3, 0, 100)(3) == 50


def test_nothing_that_xml_forbids_is_printed():
    assert printable("a\x00\x1b\ud83d\tb\n😀") == "a\ufffd\ufffd\ufffd\tb\n😀"


# colour vision: Machado et al. 2009, severity 1
SEEN = {
    "all": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    cones = np.cbrt(
        np.array(
            [
                [0.4122214708, 0.5363325363, 0.0514459929],
                [0.2119034982, 0.6806995451, 0.1073969566],
                [0.0883024619, 0.2817188376, 0.6299787005],
            ]
        )
        @ rgb
    )
    return (
        np.array(
            [
                [0.2104542553, 0.7936177850, -0.0040720468],
                [1.9779984951, -2.4285922050, 0.4505937099],
                [0.0259040371, 0.7827717662, -0.8086757660],
            ]
        )
        @ cones
    )


@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_roles_stay_apart_for_every_colour_vision(colours, sight):
    seen = {
        n: oklab(np.clip(np.array(SEEN[sight]) @ linear(c), 0, 1)) for n, c in colours.items() if "role" in n
    }
    assert len(seen) == 7
    for a in seen:
        for b in seen:
            assert a == b or np.linalg.norm(seen[a] - seen[b]) > 0.1, (a, b)


@pytest.mark.parametrize("colours", [palette.LIGHT, palette.DARK], ids=["light", "dark"])
def test_the_ramp_goes_one_way_and_text_is_legible(colours):
    lightness = [oklab(linear(colours[f"--ramp-{i}"]))[0] for i in range(7)]
    assert (np.diff(lightness) < 0).all() or (np.diff(lightness) > 0).all()

    def contrast(a: str, b: str) -> float:
        x, y = (np.array([0.2126, 0.7152, 0.0722]) @ linear(colours[c]) for c in (a, b))
        return (max(x, y) + 0.05) / (min(x, y) + 0.05)

    for ground in ("--paper", "--panel", "--sunk"):
        assert contrast("--ink", ground) > 7
        assert contrast("--soft", ground) > 4.5
    assert contrast("--accent", "--paper") > 4.5


def test_light_and_dark_define_the_same_colours():
    assert palette.LIGHT.keys() == palette.DARK.keys()


def test_every_role_has_its_colours_and_its_words():
    roles = {"--role-" + role.replace(" ", "-") for role in heads.ROLES}
    assert {name for name in palette.LIGHT if name.startswith("--role-")} == roles
    assert {*words._ROLE_PHRASES, "mixed"} == set(heads.ROLES)


def test_the_summary_tells_the_findings(decoder, encoder):
    said = words.summary(decoder).replace("\u00a0", " ")
    assert "36 attention heads in 6 layers, 12 KV heads between them" in said
    assert "Keeping the full context for 2 of 12 KV heads (20 %)" in said
    assert (
        "keeps, of the hidden facts, 40 of the 40 that the whole cache finds (100 %, 95 % interval 91 % to"
        in said
    )
    assert "(as many heads chosen at random find 2 % of all)" in said
    assert "from 377 MB to 85.1 MB (−77 %)" in said
    assert "decoding runs 2.3 × as fast" in said
    assert "no cache" in words.summary(encoder)
    assert "KV heads between" not in words.summary(encoder)
    advice = decoder.recommendation
    drawn = dataclasses.replace(advice.after, policy="random", needle_accuracy=0.25)
    told = words.summary(
        dataclasses.replace(decoder, recommendation=dataclasses.replace(advice, chance=(drawn,)))
    )
    assert "(as many heads chosen at random find 25\u00a0% of all)" in told
    earlier = dataclasses.replace(advice.after, needles_whole=None, needles_kept=None)
    told = words.summary(
        dataclasses.replace(decoder, recommendation=dataclasses.replace(advice, after=earlier))
    )
    assert "finds 100\u00a0% of hidden facts (whole cache: 100\u00a0%)" in told
    refused = dataclasses.replace(decoder.savings, verdict="No smaller cache is recommended: this is why.")
    told = words.summary(dataclasses.replace(decoder, savings=refused, recommendation=None))
    assert told.endswith("No smaller cache is recommended: this is why.")
    none = dataclasses.replace(decoder, recommendation=None)
    assert words.summary(none).endswith("No smaller cache is recommended.")
    whole = dataclasses.replace(decoder.recommendation, after=decoder.recommendation.before)
    assert "keep the whole cache" in words.summary(dataclasses.replace(decoder, recommendation=whole))
    assert words.headline(none) == []


@pytest.mark.parametrize(
    ("number", "unit", "told"),
    [
        (None, "share", "–"),
        (0, "share", "0 %"),
        (0.0001, "share", "< 0.1 %"),
        (0.042, "share", "4.2 %"),
        (0.5, "share", "50 %"),
        (1234.5, "tokens", "1,234 tokens"),
        (14.82, "", "14.8"),
        (0.00001, "", "1.0e-05"),
    ],
)
def test_numbers_in_words(number, unit, told):
    assert words.measured(number, unit).replace("\u00a0", " ") == told
