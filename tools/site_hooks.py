"""Hooks of the docs site: what is outside `docs/` becomes part of the site or, where it cannot, plain text.

Pages link to pictures, JSON and code by the paths of the repository, so that they can be read there too. The site takes
over the files under `reproduce/results/`; a link to any other file of the repository keeps its words only. Every
package gets a page of reference made from the docstrings of its public names.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")


_SHIM, _OUR_SHIM = "https://unpkg.com/iframe-worker/shim", "assets/iframe-worker/shim.js"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what `reproduce/` wrote, under its path in the repository, a page of reference per package, and a gallery."""
    for path in sorted(ROOT.glob("packages/*/reproduce/results/**/*")):
        if path.is_file():
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name, places in public_names().items():
        files.append(File.generated(config, f"reference/{name}.md", content=reference_page(name, places)))
    files.append(File.generated(config, "gallery.md", content=gallery_page()))
    return files


def public_names() -> dict[str, dict[str, str]]:
    """Every public name of every package, with the module that defines it: what its `__init__` imports lazily."""
    found = {}
    for path in sorted(ROOT.glob("packages/*/src/*/__init__.py")):
        module, tree = path.parent.name, ast.parse(path.read_text(encoding="utf-8"))
        exported: list[str] = next(
            (ast.literal_eval(s.value) for s in tree.body if isinstance(s, ast.Assign) and _target(s) == "__all__"), []
        )
        homes = {
            alias.asname or alias.name: statement.module or module
            for statement in ast.walk(tree)
            if isinstance(statement, ast.ImportFrom)
            for alias in statement.names
        }
        found[path.parents[2].name] = {name: f"{homes.get(name, module)}.{name}" for name in exported}
    return found


def _target(statement: ast.Assign) -> str:
    """The name that a statement assigns, if it is one."""
    first = statement.targets[0]
    return first.id if isinstance(first, ast.Name) else ""


def reference_page(package: str, places: dict[str, str]) -> str:
    """A page with an entry for every public name."""
    options = "    options:\n      show_root_heading: true\n      heading_level: 2\n"
    entries = "\n".join(f"::: {place}\n{options}" for place in places.values())
    words = f"Import these from `{package.replace('-', '_')}`."
    return f"# {package}: reference\n\n{words}\n\n{entries}"


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Fail where a public name has no entry in the reference.

    Raises:
        ValueError: With the names.
    """
    missing = []
    for package, places in public_names().items():
        page = Path(config.site_dir) / "reference" / package / "index.html"
        page = page if page.exists() else Path(config.site_dir) / "reference" / f"{package}.html"
        html = page.read_text(encoding="utf-8")
        missing += [place for place in places.values() if f'id="{place}"' not in html]
    if missing:
        raise ValueError(f"reference: no entry for {', '.join(missing)}")


def on_page_markdown(markdown: str, *, page: Page, files: Files, **_: Any) -> str:
    """Turn the repository's paths into the site's, and put cards of the packages at the mark `<!-- packages -->`.

    Raises:
        ValueError: If a link leads to nothing.
    """
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        bang, words, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return match[0]  # mkdocs checks links among its own pages
        if not (ROOT / path).exists():
            raise ValueError(f"docs/{page.file.src_uri}: {target} does not exist")
        if files.get_file_from_path(path) is not None:
            return (
                f"{bang}[{words}]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''})"
            )
        return words

    pages = {file.src_uri for file in files}
    return _LINK.sub(link, markdown).replace("<!-- packages -->", "\n".join(package_cards(pages)))


def package_cards(pages: set[str]) -> Iterator[str]:
    """A card per row of the README's table: name, paper, what it does, picture, result, command."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    yield '<div class="grid cards" markdown>\n'
    for row in re.findall(r"^\|.*\|$", readme, re.MULTILINE):
        name = re.search(r"\]\(packages/([a-z-]+)\)", row)
        if name is None:
            continue
        _, paper, does, result, _ = (cell.strip() for cell in row.strip("|").split(" | "))
        page = f"packages/{name[1]}.md" if f"packages/{name[1]}.md" in pages else f"reference/{name[1]}.md"
        parts = [f"**[{name[1]}]({page})**" + (f" · {paper}" if paper != "–" else ""), does[0].upper() + does[1:] + "."]
        if picture := picture_of(name[1]):
            parts.append(picture)
        if result != "–":
            parts.append(result[0].upper() + result[1:] + ".")
        if (ROOT / "packages" / name[1] / "src" / name[1].replace("-", "_") / "demo.py").exists() or paper != "–":
            parts.append(f"```sh\nuv run {name[1]} demo --quick\n```")
        yield "-   " + "\n\n    ".join(part.replace("\n", "\n    ") for part in parts) + "\n"
    yield "</div>"


def picture_of(package: str) -> str | None:
    """The package's picture in the README's table, as Markdown; None if it has none."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf'<img src="(packages/{package}/[^"]+)" [^>]*alt="([^"]+)">', readme)
    return f"![{found[2]}]({found[1]}){{ loading=lazy }}" if found else None


def gallery_page() -> str:
    """Every package's example, the whole file, with a picture of what the package shows."""
    parts = ["# Gallery\n\nOne file per package, which runs in under a minute on a CPU. The tests run them all."]
    for path in sorted(ROOT.glob("packages/*/examples/*.py")):
        package, code = path.parts[-3], path.read_text(encoding="utf-8")
        words = (ast.get_docstring(ast.parse(code)) or "").split("\n\n")[0]
        parts.append(f"## {package}\n\n{words}")
        if picture := picture_of(package):
            parts.append(picture)
        parts.append(f"`packages/{package}/examples/{path.name}`\n\n```python\n{code.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_post_page(output: str, *, page: Page, **_: Any) -> str:
    """Take the one script that the theme fetches from elsewhere (search in a site opened as files) from the site."""
    return output.replace(_SHIM, posixpath.relpath(_OUR_SHIM, posixpath.dirname(page.file.dest_uri) or "."))


def on_post_template(output: str, **_: Any) -> str:
    """The same for pages that are no documents, such as `404.html`."""
    return output.replace(_SHIM, _OUR_SHIM)


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Rebuild a served site when results change."""
    config.watch += [str(path) for path in sorted(ROOT.glob("packages/*/reproduce/results"))]
    return config
