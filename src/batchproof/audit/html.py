"""One self-contained HTML page of a report: no script, no request, for people and, in its last element, for programs.

Every string of a report is foreign text, a kernel's name as much as a server's answer: it is escaped, and characters
that would hide or reorder text are replaced. The exact strings are in the JSON.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count, groupby, pairwise, zip_longest
from typing import NamedTuple

from .report import HOLDS, NOT_AUDITED, NOT_EXERCISED, VARIES, Check, Launch, Report, Series

__all__ = ["render_html"]

_SYMBOLS = {HOLDS: "✓", VARIES: "✗", NOT_AUDITED: "?"}
_VERDICTS = {VARIES: "✗ varies", HOLDS: "✓ holds", NOT_EXERCISED: "? not exercised"}
# Control characters, lone surrogates (no UTF-8) and bidirectional overrides (text that reads as other text).
_UNSHOWABLE = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_WIDTH, _LEFT, _RIGHT, _TOP = 760.0, 90.0, 720.0, 44.0  # of a plot, in units of its viewBox: pixels at full width

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--text:#1b1f24;--soft:#57606a;--line:#d8dee4;--tint:#f5f7f9;
--good:#0f5a2c;--good-bg:#e8f5ec;--bad:#97160f;--bad-bg:#fdeceb;--open:#6b4400;--open-bg:#fdf3dc;
--k0:#1f5fbf;--k1:#b4451a;--k2:#1c7a52;--k3:#8a3fa0;--k4:#8f5f00;--k5:#0f7480}
@media screen and (prefers-color-scheme:dark){:root{--page:#101418;--text:#e4e8ec;--soft:#9da7b1;--line:#303841;
--tint:#181e24;--good:#8fe0ad;--good-bg:#10301d;--bad:#ffb4ab;--bad-bg:#3d1613;--open:#f3cd83;--open-bg:#33270d;
--k0:#7fb0ff;--k1:#ff9f73;--k2:#6fd0a0;--k3:#d3a0e8;--k4:#e6b85c;--k5:#6cd0dc}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:53rem;padding:clamp(1.25rem,4vw,3.5rem) clamp(1rem,4vw,1.75rem);background:var(--page);
color:var(--text);font:1rem/1.6 system-ui,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
h1,h2,h3{line-height:1.25}h1{font-size:clamp(1.4rem,4vw,1.9rem);margin:.2rem 0 1.5rem}
h2{font-size:1.2rem;margin:3rem 0 .9rem}h3{font-size:1rem;margin:2rem 0 .6rem}p{margin:.6rem 0;max-width:44rem}
.eyebrow,figcaption,footer{font-size:.875rem;margin:0;color:var(--soft)}footer{margin-top:3.5rem}
code,pre{font:.875em/1.55 ui-monospace,Menlo,Consolas,monospace}
.holds{color:var(--good)}.varies{color:var(--bad)}.not{color:var(--open)}
.banner{border-left:.3rem solid;border-radius:.4rem;padding:1.1rem 1.35rem}.banner strong{font-size:1.35rem}
.banner p{color:var(--text);max-width:none;margin:.3rem 0 0}.banner.holds{background:var(--good-bg)}
.banner.varies{background:var(--bad-bg)}.banner.not{background:var(--open-bg)}
.box{overflow-x:auto;border:1px solid var(--line);border-radius:.4rem}.box:focus-visible{outline:2px solid var(--k0)}
table{border-collapse:collapse;width:100%;font-size:.925rem;overflow-wrap:break-word}
th,td{text-align:left;vertical-align:top;padding:.55rem .9rem;border-top:1px solid var(--line)}
thead th{border-top:0;background:var(--tint)}thead th,.verdict{white-space:nowrap}.comparisons{text-align:right}
tbody th{min-width:8rem;max-width:16rem}.detail,.kernels td{min-width:13rem;width:48%;overflow-wrap:anywhere}
.kernels tbody th{color:var(--soft);font-weight:400}.kernels tbody+tbody tr:first-child>*{border-top-color:var(--text)}
mark{background:var(--bad-bg);color:var(--bad);font-weight:600;padding:.05em .25em;border-radius:.2em}
dl{display:grid;grid-template-columns:minmax(6rem,max-content) minmax(0,1fr);gap:.45rem 1.5rem;margin:.9rem 0}
dt{color:var(--soft);max-width:14rem}dd{margin:0}ul{padding-left:1.25rem;margin:.6rem 0}li{margin:.35rem 0}
pre{margin:0;padding:1rem 1.2rem;background:var(--tint);overflow-wrap:normal;width:max-content;min-width:100%}
figure{margin:1.25rem 0 2.5rem}figcaption{margin-top:.6rem}
svg{display:block;width:100%;min-width:38rem;height:auto;padding:1rem;font:12px system-ui,sans-serif;fill:none}
.label{fill:var(--soft)}.flag{fill:var(--text);font-weight:600}.rule{stroke:var(--line)}.base{stroke:var(--soft)}
.cut{stroke:var(--text);stroke-dasharray:3 3}.band{fill-opacity:.28}.path{stroke:var(--k0);stroke-opacity:.55}
.zero{fill:var(--page);stroke:var(--k0);stroke-width:1.5}.hole{fill:var(--line);fill-opacity:.55}
.cross{stroke:var(--soft);stroke-width:1.5}
@media(max-width:34rem){dl{grid-template-columns:minmax(0,1fr);gap:0}dd{margin-bottom:.7rem}}
@media print{body{max-width:none;padding:0;font-size:10pt}.box{overflow:visible}svg{min-width:0}
pre{white-space:pre-wrap;width:auto}figure,tr,.banner{break-inside:avoid}h2,h3{break-after:avoid}
*{print-color-adjust:exact}}
""" + "".join(f".k{n}{{fill:var(--k{n})}}" for n in range(6))


def render_html(report: Report) -> str:
    """The report as one page, which loads nothing and runs nothing; its own content security policy sees to that.

    ``Report.from_json`` reads the text of its element ``#report``.
    """
    sections = {
        "What varies": _cause(report, report.cause) if report.cause else "",
        "Relations": _relations(report),
        "Bit classes of the batch size": f"<p><code>{_escape(report.classes)}</code></p>" if report.classes else "",
        "Measurements": "".join(_figure(series, f"plot{n}") for n, series in enumerate(report.series)),
        "Not covered by this verdict": _list(report.gaps),
        "Not observed": _list(report.not_observed),
        "To see it": _box("reproduction", f"<pre>{_escape(report.reproduction)}</pre>") if report.reproduction else "",
        "Environment": _facts(report.environment),
        "Settings": _facts(report.settings),
    }
    body = "\n".join(f"<section><h2>{title}</h2>{inner}</section>" for title, inner in sections.items() if inner)
    # As an escape, "<" can neither end the script element nor begin a comment in it.
    data = report.to_json().replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(report.name)}: {report.verdict} (batchproof audit)</title>
<style>{_STYLE}</style></head><body><main>
<p class="eyebrow">batchproof audit · {_escape(report.target)}</p>
<h1>{_escape(report.name)}</h1>
{_banner(report)}
{body}
</main>
<footer>The last element of this page, <code>#report</code>, is this report as JSON.</footer>
<script type="application/json" id="report">{data}</script>
</body></html>
"""


def _banner(report: Report) -> str:
    """The verdict by colour, symbol and word, and what it rests on."""
    verdicts = [check.verdict for check in report.checks]
    told = ", ".join(f"{verdict} {verdicts.count(verdict)}" for verdict in _VERDICTS if verdict in verdicts) or "none"
    made = sum(check.cases for check in report.checks)
    held = {check.relation for check in report.checks if check.verdict == HOLDS}
    unmet = [name for name in report.required if name not in held] if report.verdict == NOT_AUDITED else []
    lines = [
        report.error,
        f"Required, and not exercised: {', '.join(unmet)}." if unmet else "",
        f"Relations: {told}. Comparisons of bits: {made:,} in {report.seconds:.1f} s. Exit code {report.exit_code}.",
    ]
    told = "".join(f"<p>{_escape(line)}</p>" for line in lines if line)
    headline = f"{_SYMBOLS[report.verdict]} {_escape(report.headline.capitalize())}"
    return f'<div class="banner {report.verdict}"><strong>{headline}</strong>{told}</div>'


def _cause(report: Report, cause: Check) -> str:
    """The first relation that varies, in which op, from where on, by how much, and what is launched there."""
    from_on = "" if cause.threshold is None else f"from {cause.threshold} {cause.unit} on"
    facts: dict[str, object] = {"Op": cause.op, "Where": cause.where, "Threshold": from_on}
    seen = cause.difference
    if seen is not None:
        facts["Elements"] = f"{seen.elements:,} of {seen.of:,} differ"
        facts["First at"] = f"{seen.output} {list(seen.index) if seen.index else ''}"
        facts |= {"Expected": seen.expected, "Found": seen.found}
        facts["Largest distance"] = "" if seen.ulps is None else f"{seen.ulps:,} ulp"
        facts["Largest difference"] = seen.largest
    lines = [f"The first relation that varies: <strong>{_escape(cause.relation)}</strong>.", _escape(cause.detail)]
    if sum(check.verdict == VARIES for check in report.checks) > 1:
        lines.append("The others that vary may do so for the same reason.")
    return "".join(f"<p>{line}</p>" for line in lines if line) + _facts(facts) + _kernels(cause)


def _kernels(cause: Check) -> str:
    """The launches on either side of the threshold, attribute by attribute, with what differs marked."""
    if cause.launches is None or not any(cause.launches):
        return ""
    at = "" if cause.threshold is None else f" {cause.threshold} {cause.unit}"
    sides = ("Below" + at, "From" + at) if at else ("Before", "After")
    head = "".join(f'<th scope="col">{_escape(text)}</th>' for text in ("Launch", *sides))
    bodies = "".join(f"<tbody>{_launch(*pair)}</tbody>" for pair in zip_longest(*cause.launches))
    table = f'<table class="kernels"><thead><tr>{head}</tr></thead>{bodies}</table>'
    return f"<h3>Kernels on either side</h3><p>≠ marks what differs.</p>{_box('kernels on either side', table)}"


def _launch(before: Launch | None, after: Launch | None) -> str:
    """Rows of the attributes that either has."""
    rows = ""
    for title in ("kernel", "grid", "block", "shared_bytes"):
        values = [getattr(side, title, ()) for side in (before, after)]
        texts = [_escape("x".join(map(str, value)) if isinstance(value, tuple) else str(value)) for value in values]
        mark = ("<mark>≠&nbsp;", "</mark>") if texts[0] != texts[1] else ("", "")
        cells = "".join(f"<td>{mark[0]}<code>{text or 'none'}</code>{mark[1]}</td>" for text in texts)
        rows += f'<tr><th scope="row">{title.replace("_", " ")}</th>{cells}</tr>' if any(values) else ""
    return rows


def _relations(report: Report) -> str:
    titles = ("Relation", "Verdict", "Comparisons", "Detail")
    head = "".join(f'<th scope="col" class="{title.lower()}">{title}</th>' for title in titles)
    rows = "".join(
        f'<tr><th scope="row">{_escape(c.relation)}{" (required)" if c.relation in report.required else ""}</th>'
        f'<td class="verdict {c.verdict}">{_VERDICTS[c.verdict]}</td>'
        f'<td class="comparisons">{c.cases:,}</td><td class="detail">{_escape(c.detail)}</td></tr>'
        for c in report.checks
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return _box("relations", table) if rows else ""


class _Point(NamedTuple):
    """A measurement: its place on the x axis, its name, its number."""

    x: float
    name: str
    y: float | None


class _Axis(NamedTuple):
    """Values to units of the viewBox, and what to write where."""

    at: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


class _Plot(NamedTuple):
    """The inside of a plot down to ``base``, its x axis; what to write beside it; and what it shows, in words."""

    marks: str
    base: float
    ticks: Sequence[tuple[float, str]]
    caption: str


def _figure(series: Series, key: str) -> str:
    """A series as a figure; one with nothing to draw says so."""
    numeric = all(isinstance(x, (int, float)) for x in series.x)
    places = [float(x) if numeric else float(i) for i, x in enumerate(series.x)]
    points = sorted(map(_Point, places, map(_plain, series.x), series.y), key=lambda point: point.x)
    title = _escape(series.title)
    if all(point.y is None for point in points):
        return f"<figure><h3>{title}</h3><figcaption>Nothing was measured.</figcaption></figure>"
    classes = series.kind == "classes"
    axis = _x_axis(points, numeric, log=numeric and classes and points[0].x > 0)
    plot = _classes_plot(points, axis) if classes else _spread_plot(points, axis)
    svg = (
        f'<svg role="img" aria-labelledby="{key}-title {key}-desc" viewBox="0 0 {_WIDTH} {plot.base + 54:.1f}">'
        f'<title id="{key}-title">{title}</title><desc id="{key}-desc">{_escape(plot.caption)}</desc>'
        f"{_frame(series, axis, plot)}{plot.marks}</svg>"
    )
    return f"<figure><h3>{title}</h3>{_box(series.title, svg)}<figcaption>{_escape(plot.caption)}</figcaption></figure>"


def _frame(series: Series, axis: _Axis, plot: _Plot) -> str:
    """Both axes, with their labels and as many ticks as can be read."""
    parts = [_text(0, 14, _fit(series.y_label, _WIDTH), "start")]
    for y, label in plot.ticks:
        rule = _mark(f'path d="M{_LEFT} {y:.1f}H{_RIGHT}"', "rule")
        parts.append(rule + _text(_LEFT - 10, y + 4, label, "end"))
    parts.append(_mark(f'path d="M{_LEFT} {plot.base:.1f}H{_RIGHT}"', "base"))
    end, widest = 0.0, min(100.0, max(_wide(name) for _, name in axis.ticks)) + 6  # one for all: regular steps
    for x, name in axis.ticks:
        if x > end:
            end = x + widest
            tick = _mark(f'path d="M{x:.1f} {plot.base:.1f}v5"', "base")
            parts.append(tick + _text(x, plot.base + 20, _fit(name, 100)))
    parts.append(_text((_LEFT + _RIGHT) / 2, plot.base + 44, _fit(series.x_label, _RIGHT - _LEFT)))
    return "".join(parts)


def _x_axis(points: Sequence[_Point], numeric: bool, log: bool) -> _Axis:
    """Labels at equal distances, numbers in proportion, or numbers by their logarithm with ticks at powers of two."""
    scale: Callable[[float], float] = math.log2 if log else float
    low, high = scale(points[0].x), scale(points[-1].x)
    middle, half = (low + high) / 2, (high - low) / 2 or 1.0

    def at(x: float) -> float:
        return (_LEFT + _RIGHT) / 2 + (scale(x) - middle) / half * ((_RIGHT - _LEFT) / 2 - 12)

    powers = range(math.ceil(low), math.floor(high) + 1) if log else range(0)
    if len(powers) > 1:
        return _Axis(at, [(at(2.0**n), _plain(2.0**n)) for n in powers])
    # "model.layers.0" to "model.layers.31" are told apart by their last part, "0.25" and "0.5" by all of it.
    parts = [[point.name] if numeric else point.name.split(".") for point in points]
    endings = ([".".join(part[-n:]) for part in parts] for n in count(1))
    names = next(names for names in endings if len(set(names)) == len({point.name for point in points}))
    return _Axis(at, [(at(point.x), name) for point, name in zip(points, names, strict=True)])


def _y_axis(values: Sequence[float], base: float) -> _Axis:
    """From zero up; by decades above a base line of zeros, if the values span more than two."""
    positive = [value for value in values if value > 0] or [1.0]
    least, most = min(positive), max(positive)
    tall = base - _TOP - 8
    if math.log10(most) - math.log10(least) <= 2:
        unit = 10.0 ** max(-300, math.floor(math.log10(most)))
        step = next(unit * n for n in (0.2, 0.5, 1, 2) if most <= 5 * unit * n)
        step = max(1.0, step) if all(float(value).is_integer() for value in values) else step
        ticks = [(base - n * step / most * tall, f"{n * step:g}") for n in range(int(most / step) + 1)]
        return _Axis(lambda y: base - y / most * tall, ticks)
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
    decade = (tall - 18) / (high - low)
    shown = range(low, high + 1, math.ceil((high - low) / 8))
    ticks = [(base, "0"), *((base - 18 - (n - low) * decade, f"1e{n}" if n else "1") for n in shown)]
    return _Axis(lambda y: base - 18 - (math.log10(y) - low) * decade if y else base, ticks)


def _classes_plot(points: Sequence[_Point], axis: _Axis) -> _Plot:
    """A lane for each class, in the order in which they appear; bands join neighbours of one class."""
    measured = [point for point in points if point.y is not None]
    lanes = {y: n for n, y in enumerate(dict.fromkeys(point.y for point in measured))}
    height = min(30.0, 270.0 / len(lanes))
    base = _TOP + height * len(lanes) + 6
    runs = [list(group) for _, group in groupby(measured, key=lambda point: point.y)]
    marks: list[str] = []
    for run in runs:
        lane, name = lanes[run[0].y], f"class {_plain(run[0].y)}"
        middle, color, left = _TOP + (lane + 0.5) * height, f"k{lane % 6}", axis.at(run[0].x)
        if len(run) > 1:
            place = f'x="{left:.1f}" y="{middle - height / 3:.1f}" height="{height / 1.5:.1f}" rx="1"'
            tip = f"{name}: {run[0].name} to {run[-1].name}, {len(run)} measured"
            marks.append(_mark(f'rect {place} width="{axis.at(run[-1].x) - left:.1f}"', f"band {color}", tip))
        for point in _thin(run, axis):
            dot = f'circle cx="{axis.at(point.x):.1f}" cy="{middle:.1f}" r="{max(1.2, height / 8):.1f}"'
            marks.append(_mark(dot, color, f"{point.name}: {name}"))
    changes = [(before[-1], after[0]) for before, after in pairwise(runs)]
    if len(changes) <= 24:  # more are a pattern, which lines would hide
        flags = [(b.x, f"from {b.name}" if b.x - a.x == 1 else f"{a.name} to {b.name}") for a, b in changes]
        marks.insert(0, _flags(flags, axis, base))
    written = list(lanes.items())[:: math.ceil(15 / height)]
    ticks = [(_TOP + (n + 0.5) * height, _fit(f"class {_plain(y)}", _LEFT - 12)) for y, n in written]
    caption = (
        f"A class is one result, to the bit. A dot is one of {len(measured)} measurements; a band joins neighbours."
    )
    return _Plot("".join(marks), base, ticks, caption)


def _spread_plot(points: Sequence[_Point], axis: _Axis) -> _Plot:
    """A line over what was measured, broken where nothing was observed; zeros lie on the base line."""
    base = _TOP + 220
    values = [point.y for point in points if point.y is not None]
    scale = _y_axis(values, base)
    lines, marks = "", ""
    for absent, group in groupby(_thin(points, axis), key=lambda point: point.y is None):
        run = [(axis.at(x), name, y or 0.0) for x, name, y in group]
        if absent:
            hole = f'rect x="{run[0][0] - 4:.1f}" y="{_TOP}" width="{run[-1][0] - run[0][0] + 8:.1f}" height="220"'
            marks += _mark(hole, "hole")
        else:
            lines += "M" + "L".join(f"{x:.1f} {scale.at(y):.1f}" for x, _, y in run)
        for x, name, y in run:
            if absent:
                marks += _mark(f'path d="M{x - 3:.1f} {base - 3}l6 6m0-6l-6 6"', "cross", f"{name}: not observed")
            else:
                dot = f'circle cx="{x:.1f}" cy="{scale.at(y):.1f}" r="3.2"'
                marks += _mark(dot, "k0" if y else "zero", f"{name}: {_plain(y)}")
    first = next((point for point in points if point.y), None)
    marks = _mark(f'path d="{lines}"', "path") + marks
    marks = _flags([(first.x, f"first at {first.name}")] if first else [], axis, base) + marks
    seen = {"Filled: not zero": first, "Hollow: zero": 0 in values, "Crossed: not observed": len(values) < len(points)}
    caption = ". ".join([*(word for word, there in seen.items() if there), f"The largest is {max(values):.3g}."])
    return _Plot(marks, base, scale.ticks, caption)


def _thin(points: Sequence[_Point], axis: _Axis) -> list[_Point]:
    """Of marks within 4, which the eye cannot part: the first, last, highest and lowest; every gap and zero stays."""
    kept: dict[_Point, None] = {}
    for _, group in groupby(points, key=lambda p: (axis.at(p.x) // 4, p.y is None, p.y == 0)):
        near = list(group)
        picked = {near[0], near[-1], *(pick(near, key=lambda p: p.y or 0) for pick in (min, max))}
        kept |= dict.fromkeys(point for point in near if point in picked)
    return list(kept)


def _flags(flags: Iterable[tuple[float, str]], axis: _Axis, base: float) -> str:
    """Dashed lines over the whole height, with a text on top where there is room for one."""
    parts, end = [], 0.0
    for value, text in flags:
        x, shown = axis.at(value), _fit(text, 420)
        parts.append(_mark(f'path d="M{x:.1f} {_TOP - 8}V{base:.1f}"', "cut"))
        left = max(0.0, min(_WIDTH - _wide(shown), x - _wide(shown) / 2))
        if left >= end:
            parts.append(_text(left + _wide(shown) / 2, _TOP - 13, shown, css="flag"))
            end = left + _wide(shown)
    return "".join(parts)


def _mark(shape: str, css: str, tip: str = "") -> str:
    """An element of SVG; hovering it shows ``tip``."""
    title = f"<title>{_escape(tip)}</title>" if tip else ""
    return f'<{shape} class="{css}">{title}</{shape.split()[0]}>'


def _text(x: float, y: float, text: str, anchor: str = "middle", css: str = "label") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{_escape(text)}</text>'


def _wide(text: str) -> float:
    """A width that ``text`` does not exceed in any common font, at 12 pixels."""
    return sum(12.0 if c in "MW@%mw…" or c > "\u2e00" else 8.0 for c in text)


def _fit(text: str, room: float) -> str:
    text = cut = text[:200]
    while _wide(cut) > room:
        text = text[:-1]
        cut = f"{text}…"
    return cut


def _facts(entries: Mapping[str, object]) -> str:
    pairs = [(title, _plain(value)) for title, value in entries.items() if value not in (None, "")]
    rows = "".join(f"<dt>{_escape(title)}</dt><dd>{_escape(text)}</dd>" for title, text in pairs)
    return f"<dl>{rows}</dl>" if rows else ""


def _list(entries: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_escape(entry)}</li>' for entry in entries)}</ul>" if entries else ""


def _box(label: str, inner: str) -> str:
    """What may be wider than the page scrolls in its own box, which the keyboard can reach."""
    return f'<div class="box" tabindex="0" role="region" aria-label="{_escape(label)}">{inner}</div>'


def _plain(value: object) -> str:
    """Text as it is, anything else as JSON, which is exact; -0.0 keeps its sign."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False).removesuffix(".0")


def _escape(text: str) -> str:
    return html.escape(_UNSHOWABLE.sub("\ufffd", text))
