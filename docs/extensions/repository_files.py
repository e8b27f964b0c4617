"""Links that leave the folder of the documentation become pages of the site that show the file or list the folder.

A page links to `../recipes/minimal_loop.py` as it would on a code host. The site has to work from a disk too, so a page
under `files/` shows what such a link names: Markdown as text, code with its colors, a folder as a list of its files.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from docutils import nodes
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.osutil import relative_uri

LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json"}


def page_of(path: PurePosixPath) -> str:
    """Return the page that shows a file or a folder of the repository."""
    return f"files/{path}"


class LeavingLinks(SphinxTransform):
    """Points links that leave the documentation to the pages of what they name."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Replace such links before anything tries to find them among the documents."""
        source, root = Path(self.env.srcdir), Path(self.env.srcdir).parent
        folder = (source / self.env.docname).parent
        for kind in (addnodes.pending_xref, addnodes.download_reference):
            for node in list(self.document.findall(kind)):
                target, _, fragment = node.get("reftarget", "").partition("#")
                path = (folder / target).resolve()
                if not path.exists():  # the text of a page that includes a file of the root of the repository
                    path = (root / target).resolve()
                if node.get("refdomain") == "doc":  # a Markdown file, as a document without its suffix
                    path, fragment = Path(target + ".md"), node.get("reftargetid") or ""
                if path.is_relative_to(source) or not path.is_relative_to(root) or not path.exists():
                    continue
                shown = PurePosixPath(path.relative_to(root).as_posix())
                self.env.metadata[self.env.docname].setdefault("files", []).append(str(shown))
                uri = relative_uri(self.env.docname + ".html", page_of(shown) + ".html")
                uri += f"#{fragment}" if fragment else ""
                link = nodes.reference("", "", *node.children, internal=True, refuri=quote(uri, safe="/#"))
                node.replace_self(link)


def shown_files(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Return a page for each file that a page links to, and for what these link to in turn."""
    root = Path(app.srcdir).parent
    waiting = sorted({name for page in app.env.metadata.values() for name in page.get("files", [])})
    done: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        body, linked = body_of(app, root, PurePosixPath(name))
        waiting += linked
        title = f'<p class="file-path">{escape(name)}</p>'
        yield page_of(PurePosixPath(name)), {"title": name, "body": title + body}, "page.html"


def body_of(app: Sphinx, root: Path, path: PurePosixPath) -> tuple[str, list[str]]:
    """Return the HTML that shows a file or a folder, and the files that it links to."""
    file, linked = root / path, []
    page = page_of(path) + ".html"
    if file.is_dir():
        inside = sorted(one.name for one in file.iterdir() if one.name not in ("__pycache__", "__init__.py"))
        linked = [str(path / name) for name in inside if shown(file / name)]
        items = [
            f'<li><a href="{relative_uri(page, page_of(path / one) + ".html")}">{escape(one)}</a></li>'
            if str(path / one) in linked
            else f"<li>{escape(one)}</li>"
            for one in inside
        ]
        return f"<ul>{''.join(items)}</ul>", linked
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".md":
        return app.builder.highlighter.highlight_block(text, LANGUAGES.get(file.suffix, "text")), []

    def link(match: re.Match[str]) -> str:
        target, fragment = match[2], match[3] or ""
        named = (file.parent / target).resolve()
        if not named.is_relative_to(root) or not named.exists():
            return match[0]
        relative = PurePosixPath(named.relative_to(root).as_posix())
        if named.is_relative_to(app.srcdir):
            inside = str(relative.relative_to(Path(app.srcdir).name))
            if named.suffix == ".png":
                return f'{match[1]}="{relative_uri(page, "_images/" + named.name)}"'
            return f'{match[1]}="{relative_uri(page, inside.removesuffix(".md") + ".html")}{fragment}"'
        if named.suffix == ".png":
            return f'{match[1]}="data:image/png;base64,{b64encode(named.read_bytes()).decode()}"'
        if not shown(named):
            return match[0]
        linked.append(str(relative))
        return f'{match[1]}="{relative_uri(page, page_of(relative) + ".html")}{fragment}"'

    html = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=4).render(text)
    html = html.replace("<table>", '<div class="table-wrapper"><table class="docutils">')
    html = html.replace("</table>", "</table></div>")
    html = html.replace("<pre>", '<div class="highlight"><pre>').replace("</pre>", "</pre></div>")
    return re.sub(r'(href|src)="(?!https?:|#)([^"#]+)(#[^"]*)?"', link, html), linked


def shown(file: Path) -> bool:
    """Return whether a file is text that a page can show, or a folder."""
    return file.is_dir() or file.suffix in (".md", *LANGUAGES) or file.suffix in (".txt", ".cff")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform and the pages."""
    app.add_transform(LeavingLinks)
    app.connect("html-collect-pages", lambda app: list(shown_files(app)))
    return {"parallel_read_safe": True}
