"""What the site has beside docs/*.md: the README as first page, the reference, repository files.

A page keeps its repository links: `../tests/x.py` on docs/a.md works on a code host, and here leads
to a copy of the file under repository/. Markdown files that are linked become pages.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()([^)\s#]+)")  # up to its anchor
MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def site_path(file: str) -> str:
    """Where a file of the repository lies in the site."""
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    return {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}.get(file, f"repository/{file}")


def linked(file: str, text: str) -> Iterator[tuple[str, str]]:
    """(link, file of the repository) of each relative link of a page."""
    for link in LINK.findall(text):
        if "://" not in link:
            yield link, posixpath.normpath(posixpath.join(posixpath.dirname(file), link))


def rewritten(file: str, text: str) -> str:
    """The page with its relative links as the site needs them."""
    here = posixpath.dirname(site_path(file)) or "."
    targets = dict(linked(file, text))
    return LINK.sub(
        lambda m: posixpath.relpath(site_path(targets[m[0]]), here) if m[0] in targets else m[0],
        text,
    )


def generated(match: re.Match) -> str:
    if match[1] == "changelog":  # without its title
        text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        return rewritten("CHANGELOG.md", text.split("\n", 1)[1])
    return getattr(reference, match[1])()


def on_files(files: Files, config: Any) -> Files:
    """Adds the README and every file of the repository that some page leads to."""
    waiting = ["README.md", *(f"docs/{f.src_uri}" for f in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        file = waiting.pop()
        if not file.startswith("docs/") and file != "CHANGELOG.md":
            content = (ROOT / file).read_bytes()
            text = content.decode("utf-8") if file.endswith(".md") else content
            files.append(File.generated(config, site_path(file), content=text))
        if PurePosixPath(file).suffix == ".md":
            text = (ROOT / file).read_text(encoding="utf-8")
            found = [target for _, target in linked(file, text) if (ROOT / target).is_file()]
            waiting += [target for target in found if target not in seen]
            seen.update(found)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    file = page.file.src_uri
    if file.startswith("repository/"):
        file = file.removeprefix("repository/")
    else:
        file = "README.md" if file == "index.md" else f"docs/{file}"
    return MARK.sub(generated, rewritten(file, markdown))
