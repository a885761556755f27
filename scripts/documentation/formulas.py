"""Formulas as MathML, which browsers set by themselves: no script, no font."""

import html
import re

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)


def set_formulas(page: str) -> str:
    """A page's HTML with MathML in place of the LaTeX that arithmatex has marked."""
    return _FORMULA.sub(_mathml, page)


def _mathml(match: re.Match[str]) -> str:
    is_block = match[2] == "["
    latex = html.unescape(match[3]).strip()
    mathml = convert(latex, display="block" if is_block else "inline")
    return f'<div class="formula">{mathml}</div>' if is_block else mathml
