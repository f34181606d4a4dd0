"""Hooks of the docs site: what stands outside `docs/` becomes part of the site or, where it cannot, plain text.

Pages link to pictures, JSON and code by the paths of the repository, so that they can be read there too. The site takes
over the files under `reproduce/results/`; a link to any other file of the repository keeps its words only.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the results that `reproduce/` wrote, under the paths they have in the repository."""
    for path in sorted(ROOT.glob("packages/*/reproduce/results/**/*")):
        if path.is_file():
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Turn the repository's paths into the site's, and list the packages' pages at the mark `<!-- packages -->`.

    Raises:
        ValueError: If a link leads to nothing.
    """
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        bang, words, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return match[0]  # mkdocs checks what stands among its own pages
        if not (ROOT / path).exists():
            raise ValueError(f"docs/{page.file.src_uri}: {target} does not exist")
        if files.get_file_from_path(path) is not None:
            return (
                f"{bang}[{words}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"
            )
        return words

    names = sorted(Path(file.src_uri).stem for file in files if re.fullmatch(r"packages/[^/]+\.md", file.src_uri))
    listed = "\n".join(f"- [{name}](packages/{name}.md)" for name in names)
    return _LINK.sub(link, markdown).replace("<!-- packages -->", listed)


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Rebuild a served site when results change."""
    config.watch += [str(path) for path in sorted(ROOT.glob("packages/*/reproduce/results"))]
    return config
