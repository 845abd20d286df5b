"""What the site has beside docs/: the README as its first page, and the reference of keys, made from the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add generated pages."""
    from mkdocs.structure.files import File

    readme = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text(encoding="utf-8"))
    for name, text in {"index.md": readme, **reference_pages()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def reference_pages() -> dict[str, str]:
    """Every key of the configuration, by section."""
    sys.path.insert(0, str(ROOT))  # here: mkdocs puts the path back after it has loaded its hooks
    from pipeline.config.names.reference import all_keys, default_text

    lines = ["# Every key", "", "Made from the code, as `loradrop keys` prints it."]
    for key in all_keys():
        if "." not in key.key:
            lines += ["", f"## {key.key}", "", key.meaning]
        if key.type == "section":
            continue
        limits = ", ".join(part for part in (f"`{key.type}`", key.range and f"`{key.range}`") if part)
        lines += ["", f"**`{key.key}`** · {limits} · default `{default_text(key.default)}`", "", key.meaning]
    return {"reference/keys.md": "\n".join(lines) + "\n"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A file outside docs/ is named instead of linked; one that is not there is left for the check."""
    source = "README.md" if page.file.src_uri == "index.md" else f"docs/{page.file.src_uri}"

    def named(match: re.Match[str]) -> str:
        place = ((ROOT / source).parent / match[2]).resolve()
        outside = place.is_relative_to(ROOT) and not place.is_relative_to(ROOT / "docs")
        return f"{match[1]} (`{place.relative_to(ROOT)}`)" if outside and place.exists() else match[0]

    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)*[\w./-]+)\)", named, markdown)
