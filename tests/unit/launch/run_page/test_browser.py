"""The run page in a real browser: curves are drawn, keys step, nothing is said to the console."""

import itertools
import math

import pytest

from launch.run_page.page import render
from launch.run_page.records import read_run
from tests.browser import CHROMIUM, Browser
from tests.unit.launch.run_page.test_page import HOSTILE, sample, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
MADE = (
    "[...document.querySelectorAll('#tokens .token:not(.open):not(.later)')].map(t => t.innerText)"
)
LATER = "document.querySelectorAll('#tokens .later').length"
SAID = "document.getElementById('pass-said').textContent"
DRAWN = "document.querySelectorAll('figure[data-panel=\"{}\"] .plot path.curve').length"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser") / "profile")
    yield browser
    browser.close()


def page_of(tmp_path, *names, **run):
    runs = [read_run(write_run(tmp_path / name, **run), name) for name in names]
    file = tmp_path / "page.html"
    file.write_bytes(render(runs).encode("utf-8", errors="backslashreplace"))
    return file


def test_curves_are_drawn_and_nothing_is_wider_than_the_window(browser, tmp_path):
    """Claim: every curve of two runs has a line inside its figure, light and dark, at both widths;
    other axes draw them again, a logarithmic one with equal steps for equal ratios."""
    file = page_of(tmp_path, "a", "b", steps=5)
    # The masked share of one half has the same value in all steps.
    inside = (
        "[...document.querySelectorAll('.plot path.curve')].every(curve => {"
        "const box = curve.getBBox(), frame = curve.ownerSVGElement.viewBox.baseVal;"
        "return box.width > 100 && box.x >= 0 && box.y >= 0"
        "  && box.x + box.width <= frame.width && box.y + box.height <= frame.height; })"
    )
    for width, dark in ((390, False), (1600, True)):
        browser.open(file, width=width, dark=dark)
        assert browser.evaluate(DRAWN.format("loss")) == 2
        assert browser.evaluate(DRAWN.format("KL by masked share")) == 4
        assert browser.evaluate(DRAWN.format("KL by position in the block")) == 4
        assert browser.evaluate(DRAWN.format("peak memory by phase")) == 4
        assert browser.evaluate(DRAWN.format("the slowest rank of each phase")) == 2
        assert browser.evaluate(inside) is True
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") is not dark
    assert browser.evaluate("document.getElementById('trajectory').hidden") is True
    browser.evaluate(
        "(select => { select.value = 'cumulative_trained_tokens';"
        "select.dispatchEvent(new Event('change')); })(document.getElementById('axis'))"
    )
    assert browser.evaluate(DRAWN.format("loss")) == 2
    assert browser.evaluate("document.querySelector('.plot').ariaLabel") == (
        "loss over trained tokens"
    )
    heights = (
        "[...document.querySelectorAll('figure[data-panel=\"loss\"] svg text')].map(t =>"
        "  [+t.getAttribute('y') - 4, +t.textContent]).filter(([y]) => y < 168)"
    )
    browser.evaluate(
        "(select => { select.value = 'logarithmic';"
        "select.dispatchEvent(new Event('change')); })(document.getElementById('vertical'))"
    )
    marks = browser.evaluate(heights)
    slopes = [(a[0] - b[0]) / math.log(b[1] / a[1]) for a, b in itertools.pairwise(marks)]
    assert len(marks) > 2 and slopes == pytest.approx([slopes[0]] * len(slopes), rel=1e-3)
    assert browser.evaluate(inside) is True
    assert browser.said == []


def test_keys_step_through_the_passes(browser, tmp_path):
    """Claim: the page opens with the whole response; a key left takes one pass back, so that the
    tokens of later passes are open and blocks without a pass are told apart."""
    texts = ["a", "b", "c", "d", "e", "f"]  # committed in passes 2 1 | 5 3 4 3
    seen = {
        "confidence": [0.5, 1, 0.125, 0.3, 0.4, 0.5],
        "kl": [None, 0.1, 0.01234, None, 2, None],
        "teacher": [None, [["b", 0.9]], [["<b>", 0.75], ['"', 0.2]], None, [[7, 1]], None],
    }
    file = page_of(tmp_path, "run", samples=[sample(response_texts=texts, **seen)])
    browser.open(file, width=390)
    assert browser.evaluate(MADE) == texts
    expected = [["a", "b", "d", "e", "f"], ["a", "b", "d", "f"], ["a", "b"], ["b"], [], []]
    for made, later in zip(expected, [0, 0, 4, 4, 4, 4], strict=True):
        browser.press("ArrowLeft")
        assert (browser.evaluate(MADE), browser.evaluate(LATER)) == (made, later)
    browser.press("ArrowRight")
    assert browser.evaluate(SAID) == "pass 1 of 5 · block 1 of 2 · 1 of 6 tokens"
    browser.evaluate("document.getElementById('tokens').focus()")
    browser.press("End")
    assert browser.evaluate(MADE) == texts
    x, y = browser.evaluate(
        "(b => [b.x + b.width / 2, b.y + b.height / 2])"
        "(document.querySelectorAll('#tokens .token')[2].getBoundingClientRect())"
    )
    browser.point(x, y)
    told = browser.evaluate("document.getElementById('tip').textContent")
    first, _, passes, *rest = told.splitlines()
    assert (first, passes) == ('"c"', "pass 3 of the block's 3, 5 of the response")
    assert rest == [
        "confidence 12.5 %",
        "KL 0.0123 nats in the trained state",
        'teacher: "<b>" 75 %, "\\"" 20 %',
    ]
    assert browser.said == []


def test_a_long_response_follows_the_pass(browser, tmp_path):
    """Claim: it opens at its beginning, and a step shows the token that it committed."""
    many = 400
    long = {name: [1] * many for name in ("response_ids", "committed_at")}
    file = page_of(tmp_path, "run", samples=[sample(**long, response_texts=["word\n"] * many)])
    browser.open(file, width=390)
    box = "document.getElementById('tokens')"
    assert browser.evaluate(f"{box}.scrollTop") == 0
    browser.press("ArrowLeft")
    assert browser.evaluate(f"{box}.scrollTop") > 0
    inside = (
        f"(frame => (place => place.top >= frame.top && place.bottom <= frame.bottom)"
        f"({box}.querySelector('.fresh').getBoundingClientRect()))({box}.getBoundingClientRect())"
    )
    assert browser.evaluate(inside) is True
    assert browser.said == []


def test_a_hostile_response_is_text(browser, tmp_path):
    """Claim: markup in a response is shown as it is written and runs nowhere; and what the page's
    policy should stop, it stops."""
    texts = [*HOSTILE, "\n", ""]
    file = page_of(tmp_path, "run", samples=[sample(response_texts=texts, prompt=HOSTILE[0])])
    browser.open(file, width=1600)
    assert browser.evaluate("document.title") == "run"
    assert browser.evaluate("document.querySelectorAll('#tokens *:not(span)').length") == 0
    shown = browser.evaluate(
        "[...document.querySelectorAll('#tokens .token')].map(t => t.textContent)"
    )
    assert shown[:3] == texts[:3] and shown[4:] == ["↵\n", "◌"]
    assert browser.said == []
    browser.evaluate("document.body.append(document.createRange().createContextualFragment("
                     "'<img src=x onerror=\"document.title=1\">'))")  # fmt: skip
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert browser.evaluate("document.title") == "run"
    assert any("Content Security Policy" in line for line in browser.said)
