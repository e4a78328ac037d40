"""The page in a real browser: no complaint in the console, and every part answers."""

import pytest

from polyhead.report import words, write_report
from polyhead.report.packing import unpack_lookups
from report import browser as chromium

pytestmark = pytest.mark.skipif(chromium.missing() is not None, reason=chromium.missing() or "")


@pytest.fixture(scope="module")
def window():
    with chromium.browser() as session:
        yield session


@pytest.fixture(scope="module")
def pages(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    names = ("decoder", "encoder", "nasty", "large")
    return {name: write_report(request.getfixturevalue(name), folder / name).page for name in names}


def card(window) -> str:
    return window.run("return document.getElementById('card').dataset.head")


def text_of(window, ident: str) -> str:
    return window.run("return document.getElementById(arguments[0]).textContent", ident)


def place(window, ident: str) -> list[float]:
    """Brings an element into view and says where it stands."""
    script = "document.documentElement.style.scrollBehavior = 'auto';"
    window.run(script + "document.getElementById(arguments[0]).scrollIntoView({block: 'center'})", ident)
    window.rest()
    script = "const r = document.getElementById(arguments[0]).getBoundingClientRect();"
    return window.run(script + "return [r.x, r.y, r.width, r.height]", ident)


def settled(window, head: str) -> None:
    window.wait(f"return document.getElementById('tokens').dataset.head === '{head}'")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["decoder", "encoder", "nasty", "large"])
def test_no_complaint_and_no_overflow(window, pages, name, width, dark):
    window.size(width, 900, dark=dark)
    window.open(pages[name])
    window.wait("return document.getElementById('tokens').dataset.head")
    assert window.complaints() == []
    assert window.run("return document.documentElement.scrollWidth") <= width
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.run("return window.bad") is None
    painted = "const c = document.getElementById(arguments[0]); const d = c.getContext('2d')"
    painted += ".getImageData(0, 0, c.width, c.height).data; return new Set(new Uint32Array(d.buffer)).size"
    assert window.run(painted, "map") > 4
    assert window.run(painted, "picture") > 10


def test_a_click_on_a_head_shows_its_card(window, pages, decoder):
    window.size(1280, 900)
    window.open(pages["decoder"], "#head=0.0")
    assert card(window) == "0.0"
    x, y, *_ = place(window, "map")
    pitch, cell = 46 + 18, 24 + 1  # six layers: wide cells; see layoutMap
    layer, head = 4, 4
    window.move(x + 62 + pitch * layer + 20, y + 22 + cell * head + (head // 3) * 6 + 12, click=True)
    settled(window, "4.4")
    assert card(window) == "4.4"
    assert decoder.roles.heads[layer][head] in text_of(window, "card-title")
    shown = text_of(window, "stats").replace("\u00a0", " ")
    for m in decoder.measurements:
        assert m.title in shown
    value = decoder.measurement("largest_logit").values[layer][head]
    assert f"{value:.3g}" in shown
    assert "Layer 4, head 4" in text_of(window, "status")
    assert window.run("return location.hash") == "#head=4.4"
    assert "layer 4, head 4" in text_of(window, "reading-title")
    assert window.complaints() == []


def test_arrow_keys_walk_the_map(window, pages):
    window.size(1280, 900)
    window.open(pages["decoder"], "#head=2.2")
    window.run("document.getElementById('map').focus()")
    window.press("\ue014", "\ue015", "\ue015")  # right, down, down
    assert card(window) == "3.4"
    window.press("\ue012")  # left
    assert card(window) == "2.4"


def test_layers_run_down_where_there_is_no_room_across(window, pages):
    window.size(400, 900)
    window.open(pages["large"], "#head=2.2")
    window.run("document.getElementById('map').focus({preventScroll: true})")
    window.press("\ue015", "\ue014")  # down: a layer on; right: a head on
    assert card(window) == "3.3"


def test_the_map_takes_the_colour_of_a_measurement(window, pages, decoder):
    window.size(1280, 900)
    window.open(pages["decoder"])
    window.set("by", "entropy", "change")
    m = decoder.measurement("entropy")
    assert m.meaning in text_of(window, "by-meaning")
    assert "bits" in text_of(window, "legend")
    best = max(range(36), key=lambda i: m.flat()[i])
    first = window.run("return document.querySelector('#ranking button').textContent")
    assert first.startswith(f"{best // 6}.{best % 6} ")
    window.run("document.querySelector('#ranking button').click()")
    assert card(window) == f"{best // 6}.{best % 6}"
    assert "highest" in text_of(window, "stats")


@pytest.mark.parametrize(("name", "head"), [("decoder", (3, 2)), ("encoder", (1, 3))])
def test_pointing_at_a_token_shows_where_the_head_looks(window, pages, name, head, request):
    data = request.getfixturevalue(name)
    window.size(1280, 900)
    window.open(pages[name], f"#head={head[0]}.{head[1]}")
    settled(window, f"{head[0]}.{head[1]}")
    positions, weights = unpack_lookups(data.lookups, *head)
    for query in (len(data.text.tokens) - 1, 57):
        point = "const t = document.querySelector(`[data-i='${arguments[0]}']`);"
        point += "t.dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
        window.run(point, query)
        tinted = window.run(
            "return [...document.querySelectorAll('#tokens .looked')].map(s => Number(s.dataset.i))"
        )
        assert set(tinted) == set(positions[query][weights[query] > 0].tolist())
        strongest = int(positions[query][np_argmax(weights[query])])
        chip = window.run("return document.querySelector('#look button').textContent")
        assert ("itself" if strongest == query else f"token {strongest:,}") in chip
        assert words.measured(weights[query].max(), "share") in chip
        assert f"token {query:,}" in text_of(window, "look")


def np_argmax(values) -> int:
    return max(range(len(values)), key=lambda i: values[i])


def test_a_real_pointer_and_keys_choose_tokens(window, pages):
    window.size(1280, 900)
    window.open(pages["decoder"], "#head=1.1")
    settled(window, "1.1")
    place(window, "tokens")
    spot = """
        const place = (node) => node.getBoundingClientRect();
        const top = place(document.getElementById("tokens")).top + 60;
        const inside = (box) => box.top > top && box.width > 20 && box.width < 90;
        const token = [...document.querySelectorAll("#tokens span")].find((s) => inside(place(s)));
        const box = place(token);
        return [box.x + box.width / 2, box.y + box.height / 2, Number(token.dataset.i)];
    """
    x, y, token = window.run(spot)
    window.move(x, y, click=True)
    assert window.run("return Number(document.getElementById('look').dataset.query)") == token
    window.press("\ue014", "\ue014", "\ue012")
    assert window.run("return Number(document.getElementById('look').dataset.query)") == token + 1


def test_a_long_text_says_which_tokens_were_recorded(window, pages, large):
    window.size(1280, 900)
    window.open(pages["large"])
    window.wait("return document.getElementById('tokens').dataset.head")
    assert window.run("return document.querySelectorAll('#tokens span').length") == 8192
    pale = window.run("return document.querySelectorAll('#tokens .pale').length")
    assert pale == 8192 - len(large.lookups.queries) > 0
    assert f"{len(large.lookups.queries)} of 8,192 tokens were recorded" in text_of(window, "reading")
    seen = "const q = document.querySelector('#tokens .query').getBoundingClientRect();"
    seen += "const f = document.getElementById('tokens').getBoundingClientRect();"
    assert window.run(seen + "return q.height > 0 && q.top >= f.top && q.bottom <= f.bottom")


def test_the_slider_reads_the_curves_and_marks_the_map(window, pages, decoder):
    window.size(1280, 900)
    window.open(pages["decoder"])
    shown = text_of(window, "probe").replace("\u00a0", " ")
    assert "20 %: 2 of 12 KV heads" in shown
    assert "85.1 MB" in shown
    window.set("fraction", 9, "input")
    shown = text_of(window, "probe").replace("\u00a0", " ")
    assert "100 %: 12 of 12 KV heads" in shown
    assert "It keeps the full context (100\u00a0%, by the slider below)" in text_of(window, "card-kv")
    window.set("fraction", 0, "input")
    assert "It keeps only sinks and recent tokens" in text_of(window, "card-kv")
    assert window.complaints() == []


def test_strings_are_shown_as_they_are(window, pages):
    window.size(1280, 900)
    window.open(pages["nasty"])
    shown = text_of(window, "tokens")
    assert "</script>" in shown
    assert "<img src=x onerror=alert(1)>" in shown
    assert "⟨202E⟩" in shown  # nothing may reverse the line
    assert "⟨1B⟩" in shown
    assert "\u202e" not in shown
    assert window.run("return document.querySelectorAll('#tokens img, #tokens script').length") == 0


def test_on_paper_the_controls_go(window, pages):
    window.size(1000, 1400, media="print")
    window.open(pages["decoder"])
    assert window.run("return getComputedStyle(document.querySelector('.bar')).display") == "none"
    assert window.complaints() == []
