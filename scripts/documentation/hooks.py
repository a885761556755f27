"""What `mkdocs` does beyond its plugins: see `mkdocs.yml`."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from documentation.coverage import undocumented
from documentation.formulas import set_formulas
from documentation.notebooks import SOURCES, page_of
from documentation.pictures import draw_pictures
from documentation.stats_table import stats_table

_ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"'\s>]+"
    r"|<link\b(?=[^>]*\brel=[\"']?(?:stylesheet|preload|icon))[^>]*\bhref=[\"']?"
    r"(?:https?:)?//[^\"'\s>]+"
    r"|@import\s+(?:url\()?[\"']?(?:https?:)?//[^\"'\s)]+"
)


def on_pre_build(config: MkDocsConfig) -> None:
    """Refuse to build where a public name is undocumented."""
    if sentences := undocumented():
        raise PluginError("\n".join(sentences))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks' pages and the pictures."""
    for path in sorted(SOURCES.glob("*.ipynb")):
        page = page_of(path.name)
        made: dict[str, Any] = {f"{path.stem}.md": page.markdown, **page.pictures}
        for name, content in made.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for place, path in draw_pictures().items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Put in the table that comes from the code."""
    return markdown.replace("<!-- stats table -->", stats_table())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Set the formulas."""
    return set_formulas(html)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that loads anything from elsewhere."""
    for path in sorted(Path(config.site_dir).glob("**/*")):
        if path.suffix in (".html", ".css"):
            for link in _ELSEWHERE.findall(path.read_text(encoding="utf-8")):
                raise PluginError(f"{path.name} loads from elsewhere: {link}")
