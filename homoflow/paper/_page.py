"""All reports as one page that needs nothing beside it."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ._report import Claim, Report, overview

_STYLE = """
body { font: 17px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem;
       margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 3.2rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: 0.94rem; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.7rem 0.35rem 0;
         border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #555; white-space: nowrap; }
td:last-child, .verdict { white-space: nowrap; font-weight: 600; }
.good { color: #00633f; } .bad { color: #b34700; }
img { width: 100%; margin: 0.8rem 0; } .statement { font-style: italic; }
li, .small { color: #555; font-size: 0.9rem; } a { color: #0072B2; }
"""


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
        f"homoflow ({escape(kind)}). Every statement has controls, to which it does not "
        "apply: they must fail, or the measurement shows nothing.</p>",
        _overview(reports),
        *(_section(report, folder) for report in reports),
        "</body></html>",
    ]
    (folder / "report.html").write_text("\n".join(parts), encoding="utf-8")


def _overview(reports: Sequence[Report]) -> str:
    rows = "".join(
        f"<tr><td><a href='#{r.name}'>{escape(r.title)}</a></td>"
        f"<td>{line['claims that hold']}</td><td>{line['controls that fail']}</td>"
        f"<td>{line['starts, up to']}</td><td>{_marked(r.verdict, r.holds)}</td></tr>"
        for r, line in ((r, overview(r)) for r in reports)
    )
    return (
        "<table><tr><th>statement</th><th>claims hold</th><th>controls fail</th>"
        f"<th>starts, up to</th><th>verdict</th></tr>{rows}</table>"
    )


def _section(report: Report, folder: Path) -> str:
    picture = base64.b64encode((folder / f"{report.name}.png").read_bytes()).decode()
    choices = "".join(f"<li>{escape(choice)}</li>" for choice in report.choices)
    return "\n".join(
        [
            f"<h2 id='{report.name}'>{escape(report.title)}: "
            f"{_marked(report.verdict, report.holds)}</h2>",
            f"<p class='statement'>{escape(report.statement)}</p>",
            f"<img src='data:image/png;base64,{picture}' alt='{escape(report.title)}'>",
            _table("claim", report.claims, should=True),
            _table("control, which must fail", report.controls, should=False),
            f"<p class='small'>What was chosen:</p><ul>{choices}</ul>",
        ]
    )


def _table(kind: str, claims: tuple[Claim, ...], *, should: bool) -> str:
    if not claims:
        return ""
    rows = "".join(
        f"<tr><td>{escape(c.text)}</td><td>{escape(c.printed)}</td>"
        f"<td>{escape(c.measured)}</td><td>{c.seeds:,}</td>"
        f"<td>{_marked(_word(c, should), c.holds == should)}</td></tr>"
        for c in claims
    )
    return (
        f"<table><tr><th>{kind}</th><th>printed</th><th>measured</th><th>seeds</th>"
        f"<th></th></tr>{rows}</table>"
    )


def _word(claim: Claim, should: bool) -> str:
    if should:
        return "holds" if claim.holds else "does not hold"
    return "holds, but must not" if claim.holds else "fails, as it must"


def _marked(text: str, good: bool) -> str:
    return f"<span class='verdict {'good' if good else 'bad'}'>{escape(text)}</span>"
