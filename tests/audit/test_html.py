"""The HTML report: strings stay text, nothing is loaded, plots are right, and a real browser shows nothing amiss."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from batchproof.audit.html import render_html
from batchproof.audit.report import Check, Difference, Launch, Report, Series

KERNEL = "void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>"
HOSTILE = "</script><script>alert(1)</script><!--\"'& \u202e\ud800\x00 漢字 " + "kernel<" * 40
NAMES = tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(100))
VOID = {"meta"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def op_report():
    """vLLM's norm, whose block size changes at 256 rows."""
    sizes = (*range(1, 71), 128, 255, 256, 257, 1024, 4096)
    launches = tuple((Launch(KERNEL, (m, 1, 1), (block, 1, 1), 128),) for m, block in ((255, 1024), (256, 256)))
    difference = Difference("x", (17, 2048), -0.0, 0.48046875, 76, 16777216, 1, 0.0078125)
    detail = "76 of 4096 rows have other bits"
    checks = (
        Check("batch size", "varies", 1224, detail, 256, "rows", "vllm:norm", "a.b (c.py:7)", difference, launches),
        Check("position", "holds", 128, "moved to 16 places"),
        Check("graph", "not exercised", 0, "needs CUDA"),
    )
    classes = Series("Bit classes", "classes", "rows", "bit class", sizes, tuple(float(m >= 256) for m in sizes))
    return Report(
        "op", "vllm:norm", checks, "1-255 | 256-4096", ("norm: compiled",), (classes,), "import torch\nprint(1 < 2)",
        ("graph",), {"largest": 4096, "arguments": {"x": "randn[M,4096]"}}, {"device": "NVIDIA H200"}, 31.42,
    )  # fmt: skip


def model_report():
    names = (*(f"model.layers.{i}" for i in range(32)), "logits")
    spread = tuple(0.0 if i < 5 else None if i in (12, 13) else 2.0 ** (i - 40) for i in range(33))
    checks = (Check("batch size", "varies", 9, "alone and among 49", 49, "requests"), Check("position", "varies", 2))
    return Report("model", "llama", checks, series=(Series("Spread", "spread", "module", "difference", names, spread),))


def hostile_report():
    bad = HOSTILE
    launches = ((Launch(bad, (1,), (2,), 3),), ())
    check = Check(bad, "varies", 3, bad, 7, bad, bad, bad, Difference(bad, (1,), bad, "nan", 1, 2), launches)
    plots = tuple(
        Series(bad, kind, bad, bad, (bad, "W" * 300, "漢" * 300), (1, 2, None)) for kind in ("classes", "spread")
    )
    checks = (check, Check(bad, "not exercised", 0, bad))
    return Report(
        bad, bad, checks, bad, (bad,), plots, bad, (bad, bad + "2"), {bad: {bad: [bad]}}, {bad: bad}, 1.0, bad
    )


def plot_report(*series):
    return Report("op", "plots", (Check("batch size", "holds", 1),), series=series)


def big_report():
    """Series of one point, of thousands, of many classes, of none, and of numbers no axis likes."""
    many = tuple(range(1, 5001))
    return plot_report(
        Series("mod 32", "classes", "M", "class", many, tuple(m % 32 for m in many)),
        Series("every size another", "classes", "M", "class", many[:1200], many[:1200]),
        Series("late", "classes", "M", "class", many, tuple(int(m > 2500) + int(m == 4000) for m in many)),
        Series("long", "spread", "layer", "ulp", many, tuple(None if m % 900 < 9 else m % 97 * m % 89 for m in many)),
        Series("one class", "classes", "M", "class", (256,), (3,)),
        Series("one zero", "spread", "layer", "ulp", ("a",), (0,)),
        Series("from zero", "classes", "M", "class", (0, 3, 300), (0, 1, 1)),
        Series("no power of two", "classes", "M", "class", (300, 400), (0, 1)),
        Series("names", "spread", "", "", NAMES, many[:100]),
        Series("at the end", "spread", "", "", NAMES, (0,) * 99 + (1,)),
        Series("extremes", "spread", "layer", "ulp", (1, 2, 3), (5e-324, 1.0, 1.7e308)),
        Series("smallest", "spread", "layer", "ulp", (1,), (5e-324,)),
        Series("nothing", "spread", "layer", "ulp", ("a", "b"), (None, None)),
        Series("empty", "classes", "layer", "ulp", (), ()),
    )


REPORTS = {
    "op": op_report,
    "model": model_report,
    "hostile": hostile_report,
    "big": big_report,
    "empty": lambda: Report("op", "nothing"),
    "error": lambda: Report("op", "a:b", error="No module named 'a'", required=("batch size",)),
    "holds": lambda: Report("server", "x", (Check("concurrency", "holds", 297),)),
}


@pytest.fixture(params=REPORTS)
def page(request):
    return render_html(REPORTS[request.param]())


class Reader(HTMLParser):
    """Elements in order with their attributes, text outside of style and script, and what is left open."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.words, self.data = [], [], [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.data += data
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def plots(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def tips(plot, tag="*"):
    return [mark.findtext("title") for mark in plot.findall(tag) if mark.find("title") is not None]


def shown(plot):
    return [text.text for text in plot.findall("text")]


def test_every_page_is_well_formed(page):
    reader = Reader(page)
    assert reader.open == []
    assert all("role" in plot.attrib and plot.findtext("title") and plot.findtext("desc") for plot in plots(page))
    ids = [attributes["id"] for _, attributes in reader.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    levels = [int(tag[1]) for tag, _ in reader.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert (levels[0], levels.count(1)) == (1, 1)
    assert ("html", {"lang": "en"}) in reader.elements
    assert any("width=device-width" in attributes.get("content", "") for _, attributes in reader.elements)


def test_nothing_is_loaded_or_run(page):
    reader = Reader(page)
    assert not re.search(r"https?://|\bsrc=|\bhref=|url\(|@import|\bon\w+=", page.replace(HOSTILE, ""))
    assert [attributes for tag, attributes in reader.elements if tag == "script"] == [
        {"type": "application/json", "id": "report"}
    ]
    policy = next(a["content"] for _, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


@pytest.mark.parametrize("name", REPORTS)
def test_a_program_reads_the_report_back(name):
    report = REPORTS[name]()
    data = Reader(render_html(report)).data
    assert data == json.dumps(json.loads(data), indent=1).replace("<", "\\u003c") + "\n"
    assert Report.from_json(data).to_json() == report.to_json()


def test_hostile_text_stays_text():
    page = render_html(hostile_report())
    reader = Reader(page)
    page.encode()
    assert "\x00" not in page
    assert "\u202e" not in page
    visible = "</script><script>alert(1)</script><!--\"'& \ufffd\ufffd\ufffd 漢字 " + "kernel<" * 40
    assert reader.text.count(visible) >= 18
    assert [tag for tag, _ in reader.elements].count("script") == 1


def test_the_cause_is_told_in_words():
    text = Reader(render_html(op_report())).text
    assert "✗ Varies by batch size" in text
    assert "Relations: varies 1, holds 1, not exercised 1. Comparisons of bits: 1,352 in 31.4 s. Exit code 1." in text
    assert "The first relation that varies: batch size . 76 of 4096 rows have other bits Op vllm:norm" in text
    assert (
        "Where a.b (c.py:7) Threshold from 256 rows on Elements 76 of 16,777,216 differ First at x [17, 2048]" in text
    )
    assert "Expected -0 Found 0.48046875 Largest distance 1 ulp Largest difference 0.0078125" in text
    assert "graph: needs CUDA" in text
    assert "norm: compiled" in text
    assert 'Environment device NVIDIA H200 Settings largest 4096 arguments {"x": "randn[M,4096]"}' in text
    assert "graph (required)" in text
    assert "The others" not in text
    assert "The others" in Reader(render_html(model_report())).text


def test_only_what_differs_is_marked():
    page = render_html(op_report())
    assert [html.unescape(mark) for mark in re.findall(r"<mark>≠&nbsp;<code>(.*?)</code></mark>", page)] == [
        "255x1x1", "256x1x1", "1024x1x1", "256x1x1",
    ]  # fmt: skip
    assert page.count(f"<code>{html.escape(KERNEL)}</code>") == 2
    assert "Below 256 rows" in page
    assert "From 256 rows" in page


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("holds", "✓ Holds"),
        ("empty", "? Not audited"),
        ("error", "No module named 'a'"),
        ("error", "Required, and not exercised: batch size."),
    ],
)
def test_the_banner_says_why(name, words):
    assert words in Reader(render_html(REPORTS[name]())).text


def test_classes_are_lanes_with_the_threshold_on_them():
    (plot,) = plots(render_html(op_report()))
    assert tips(plot, "rect") == ["class 0: 1 to 255, 72 measured", "class 1: 256 to 4096, 4 measured"]
    assert {"from 256", "class 0", "class 1", "1", "64", "4096", "rows", "bit class"} <= set(shown(plot))
    low, high = (rect.attrib for rect in plot.findall("rect"))
    (cut,) = (path for path in plot.findall("path") if path.get("class") == "cut")
    assert cut.get("d").startswith(f"M{high['x']} ")
    assert float(low["x"]) + float(low["width"]) <= float(high["x"])
    assert low["y"] != high["y"]
    assert low["class"] != high["class"]


def test_a_change_that_was_not_followed_to_the_size_says_so():
    (plot,) = plots(render_html(plot_report(Series("t", "classes", "M", "c", (1, 200, 300), (0, 0, 1)))))
    assert "200 to 300" in shown(plot)


def test_sizes_are_placed_by_their_logarithm():
    (plot,) = plots(render_html(plot_report(Series("t", "classes", "M", "c", (4, 1, 2, 8), (0,) * 4))))
    places = [float(dot.get("cx")) for dot in plot.findall("circle")]
    steps = [b - a for a, b in pairwise(places)]
    assert steps == pytest.approx([(720 - 90 - 24) / 3] * 3, abs=0.2)


def test_thousands_of_points_are_thinned_and_no_change_of_class_is_lost():
    page = render_html(big_report())
    late, spread = plots(page)[2:4]
    dots = tips(late, "circle")
    assert len(dots) < 700
    changes = {"2500: class 0", "2501: class 1", "3999: class 1", "4000: class 2", "4001: class 1", "5000: class 1"}
    assert changes <= set(dots)
    assert {"from 2501", "from 4000"} & set(shown(late))
    assert len(tips(plots(page)[1], "circle")) == 1200
    assert len(spread.findall("circle")) < 1500
    assert sum(mark.get("class") == "hole" for mark in spread.findall("rect")) == 6


def test_a_spread_has_gaps_zeros_and_decades():
    (plot,) = plots(render_html(model_report()))
    assert "first at model.layers.5" in shown(plot)
    assert {"0", "3", "1e-3", "difference", "module"} <= set(shown(plot))
    zeros = [mark for mark in plot.findall("circle") if mark.get("class") == "zero"]
    assert len(zeros) == 5
    (base,) = {float(mark.get("cy")) for mark in zeros}
    assert f"M90.0 {base}H720.0" in [path.get("d") for path in plot.findall("path") if path.get("class") == "base"]
    others = [float(mark.get("cy")) for mark in plot.findall("circle") if mark.get("class") != "zero"]
    assert max(others) < base
    assert others == sorted(others, reverse=True)
    missing = ["model.layers.12: not observed", "model.layers.13: not observed"]
    assert [tip for tip in tips(plot, "path") if tip] == missing
    (line,) = (path.get("d") for path in plot.findall("path") if path.get("class") == "path")
    assert line.count("M") == 2, "the line is not broken where nothing was observed"
    assert f"logits: {2.0**-8}" in tips(plot, "circle")


def test_names_keep_the_part_that_tells_them_apart():
    first, last = plots(render_html(big_report()))[8:10]
    assert "0.self_attn…" in shown(first)
    assert "first at model.layers.0.self_attn.o_proj" in shown(first)
    assert "first at model.layers.99.self_attn.o_proj" in shown(last)


def test_a_spread_of_two_decades_or_less_is_linear():
    (plot,) = plots(render_html(plot_report(Series("t", "spread", "", "", ("a", "b", "c"), (0.0, 1.0, 2.0)))))
    low, middle, high = (float(mark.get("cy")) for mark in plot.findall("circle"))
    assert middle == pytest.approx((low + high) / 2, abs=0.2)
    assert {"0", "1", "2"} <= set(shown(plot))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_background(scheme):
    style = re.search(r"<style>(.*?)</style>", render_html(Report("op", "x")), re.DOTALL)[1]
    blocks = re.findall(r":root\{(.*?)\}", style, re.DOTALL)
    colors = dict(re.findall(r"--([\w-]+):(#\w+)", blocks[0 if scheme == "light" else 1]))
    pairs = [("text", ground) for ground in ("page", "tint", "good-bg", "bad-bg", "open-bg")]
    pairs += [("soft", "page"), ("good", "good-bg"), ("bad", "bad-bg"), ("open", "open-bg")]
    pairs += [(word, "page") for word in ("good", "bad", "open")]
    assert {pair for pair in pairs if contrast(*(colors[name] for name in pair)) < 4.5} == set()
    assert all(contrast(colors[f"k{n}"], colors["page"]) >= 3 for n in range(6))


def contrast(a, b):
    """As the WCAG has it."""
    bright, dim = sorted(map(luminance, (a, b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(color):
    digits = color[1:] if len(color) == 7 else "".join(c * 2 for c in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


MEASURE = """
onload = () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, at = {plots: [], outside: []};
    at.width = frame.contentWindow.innerWidth;
    at.needed = page.documentElement.scrollWidth;
    at.text = page.body.innerText;
    for (const plot of page.querySelectorAll("svg")) {
      const box = plot.getBoundingClientRect(), view = plot.viewBox.baseVal;
      at.plots.push(Math.min(box.width, box.height));
      for (const text of plot.querySelectorAll("text")) {
        const b = text.getBBox();
        if (b.x < 0 || b.y < 0 || b.x + b.width > view.width || b.y + b.height > view.height)
          at.outside.push(text.textContent);
      }
    }
    found[frame.id] = at;
  }
  document.body.replaceChildren(JSON.stringify(found));
};
"""


def browse(pages, folder):
    """What a browser finds in each page at the width of a phone and of a desk, and what its console says."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    frames = "".join(
        f'<iframe id="{name} {width}" style="width:{width}px" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in (375, 1280)
    )
    path = folder / "pages.html"
    style = "<style>iframe{border:0;height:800px}</style>"
    path.write_text(f"<meta charset=utf-8>{style}<body>{frames}<script>{MEASURE}</script>", encoding="utf-8")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--enable-logging=stderr")
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    body = re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)[1]
    return json.loads(html.unescape(body)), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return browse({name: render_html(make()) for name, make in REPORTS.items()}, tmp_path_factory.mktemp("browser"))


def test_in_a_browser_nothing_scrolls_sideways(measured):
    found, _ = measured
    assert sorted(at["width"] for at in found.values()) == [375] * len(REPORTS) + [1280] * len(REPORTS)
    assert {name: at["needed"] for name, at in found.items() if at["needed"] > at["width"]} == {}


def test_in_a_browser_the_text_is_there(measured):
    found, _ = measured
    for width in (375, 1280):
        for words in ("Varies by batch size", "from 256 rows on", KERNEL, "1024x1x1", "1-255 | 256-4096"):
            assert words in found[f"op {width}"]["text"]
        assert "<script>alert(1)</script>" in found[f"hostile {width}"]["text"]
        assert '"schema"' not in found[f"op {width}"]["text"]


def test_in_a_browser_every_plot_is_seen_whole(measured):
    found, _ = measured
    assert [len(found[f"{name} 375"]["plots"]) for name in REPORTS] == [1, 1, 2, 12, 0, 0, 0]
    assert all(size > 50 for at in found.values() for size in at["plots"])
    assert {name: at["outside"] for name, at in found.items() if at["outside"]} == {}


def test_in_a_browser_the_console_is_silent(measured):
    assert measured[1] == []


def test_the_browser_finds_planted_faults(tmp_path):
    wide = "<p style='width:2000px'>wide</p><svg viewBox='0 0 90 90'><text x='80' y='50'>outside</text></svg>"
    blocked = "<meta http-equiv=Content-Security-Policy content=\"script-src 'none'\"><script>alert(1)</script>"
    found, console = browse({"planted": f"<!doctype html>{blocked}{wide}"}, tmp_path)
    assert found["planted 375"]["needed"] >= 2000
    assert found["planted 375"]["outside"] == ["outside"]
    assert len(console) == 2
