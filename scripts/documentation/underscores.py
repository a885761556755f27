"""A Markdown extension: `_` is a letter, as in W_h, and `*` alone makes emphasis."""

from typing import Any

from markdown import Extension, Markdown
from markdown.inlinepatterns import SimpleTextInlineProcessor

#: After code, links and HTML, before emphasis.
_PRIORITY = 65


class _LiteralUnderscores(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        processor = SimpleTextInlineProcessor("(_+)")
        md.inlinePatterns.register(processor, "literal_underscore", _PRIORITY)


def makeExtension(**settings: Any) -> Extension:
    return _LiteralUnderscores(**settings)
