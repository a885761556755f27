"""All reports as one page that needs nothing beside it."""

import base64
import html
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from ._report import Claim, Report, overview

_STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 3.2rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: 0.94rem; }
table.overview td + td { white-space: nowrap; }
table.claims { table-layout: fixed; overflow-wrap: break-word; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.7rem 0.35rem 0;
         border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; white-space: nowrap; }
td:last-child, .verdict { white-space: nowrap; font-weight: 600; }
.good { color: #00633f; } .bad { color: #b34700; }
img { display: block; max-width: 100%; margin: 0.8rem auto; }
sub, sup { line-height: 0; font-size: 0.75em; } .statement { font-style: italic; }
li, .small { color: #555; font-size: 0.9rem; } a { color: #0072B2; }
"""


#: Dots per inch of the figures' files.
RESOLUTION = 150
#: Of a symbol, not of a word (which may have an underscore).
_INDEX = r"(?<![A-Za-z]{2})_(?:\{([^{}]*)\}|([A-Za-z0-9]+))"
_POWER = r"\^(?:\{([^{}]*)\}|(\([^()]*\)))"
#: Widths of a table's columns, the same for claims and controls.
_COLUMNS = ("36%", "14.5%", "29%", "6%", "14.5%")
#: Pixels of the page for an inch of a figure: text has one size in all of them.
_PIXELS = 92


def write_page(reports: Sequence[Report], folder: Path, kind: str) -> None:
    """Writes `report.html` with every claim, control, verdict and figure.

    The figures are read from `folder`, as `<name>.png`.
    """
    title = "Algorithmic regularization, statement by statement"
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{title}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{title}</h1>",
        "<p>Du, Hu &amp; Lee (2018), <i>Algorithmic Regularization in Learning Deep "
        "Homogeneous Models: Layers are Automatically Balanced</i>, measured by "
        f"homoflow ({_text(kind)}). Every statement has controls, to which it does not "
        "apply: they must fail, or the measurement shows nothing.</p>",
        _overview(reports),
        *(_section(report, folder) for report in reports),
        "</body></html>",
    ]
    (folder / "report.html").write_text("\n".join(parts), encoding="utf-8")


def _overview(reports: Sequence[Report]) -> str:
    rows = "".join(
        f"<tr><td><a href='#{r.name}'>{_text(r.title)}</a></td>"
        f"<td>{line['claims that hold']}</td><td>{line['controls that fail']}</td>"
        f"<td>{line['starts, up to']}</td><td>{line['time']}</td>"
        f"<td>{_marked(r.verdict, r.holds)}</td></tr>"
        for r, line in ((r, overview(r)) for r in reports)
    )
    return (
        "<table class='overview'><tr><th>statement</th><th>claims hold</th>"
        "<th>controls fail</th>"
        f"<th>starts, up to</th><th>time</th><th>verdict</th></tr>{rows}</table>"
        f"<p class='small'>All together: {_duration(reports)}.</p>"
    )


def _duration(reports: Sequence[Report]) -> str:
    return f"{sum(report.seconds for report in reports) / 60:.1f} minutes"


def _section(report: Report, folder: Path) -> str:
    png = (folder / f"{report.name}.png").read_bytes()
    picture = base64.b64encode(png).decode()
    choices = "".join(f"<li>{_text(choice)}</li>" for choice in report.choices)
    return "\n".join(
        [
            f"<h2 id='{report.name}'>{_text(report.title)}: "
            f"{_marked(report.verdict, report.holds)}</h2>",
            f"<p class='statement'>{_text(report.statement)}</p>",
            f"<img width='{_shown_width(png)}' alt='{html.escape(report.title)}' "
            f"src='data:image/png;base64,{picture}'>",
            _table("claim", report.claims, should=True),
            _table("control, which must fail", report.controls, should=False),
            f"<p class='small'>What was chosen:</p><ul>{choices}</ul>",
        ]
    )


def _table(kind: str, claims: tuple[Claim, ...], *, should: bool) -> str:
    if not claims:
        return ""
    rows = "".join(
        f"<tr><td>{_text(c.text)}</td><td>{_text(c.printed)}</td>"
        f"<td>{_text(c.measured)}</td><td>{c.seeds:,}</td>"
        f"<td>{_marked(_word(c, should), c.holds == should)}</td></tr>"
        for c in claims
    )
    widths = "".join(f"<col style='width: {width}'>" for width in _COLUMNS)
    return (
        f"<table class='claims'>{widths}<tr><th>{kind}</th><th>printed</th>"
        f"<th>measured</th><th>seeds</th><th></th></tr>{rows}</table>"
    )


def _word(claim: Claim, should: bool) -> str:
    if should:
        return "holds" if claim.holds else "does not hold"
    return "holds, but must not" if claim.holds else "fails, as it must"


def _marked(text: str, good: bool) -> str:
    return f"<span class='verdict {'good' if good else 'bad'}'>{_text(text)}</span>"


def _shown_width(png: bytes) -> int:
    """The width at which to show a picture of `paper`'s resolution."""
    (pixels,) = struct.unpack(">I", png[16:20])
    return round(pixels / RESOLUTION * _PIXELS)


def _text(text: str) -> str:
    """HTML, with the indices and powers of formulas (‖W_{h+1}‖_F², t^{−½}), and code."""
    # No line ends within a number such as 1e-10.
    text = re.sub(r"(\de)-(\d)", "\\1\N{NON-BREAKING HYPHEN}\\2", html.escape(text))
    for pattern, tag in ((_INDEX, "sub"), (_POWER, "sup")):
        text = re.sub(pattern, lambda m, t=tag: f"<{t}>{m[1] or m[2]}</{t}>", text)
    return re.sub("`([^`]+)`", r"<code>\1</code>", text)
