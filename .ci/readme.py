"""README, made from the site's home page: `python .ci/readme.py > README.md`"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def from_root(markdown):
    "Links of a page in nbs/ as links from the repository's root"
    return re.sub(r"\]\((?!https?:|#)", "](nbs/", markdown)


def without_attributes(markdown):
    "Images of a page without Quarto's attributes, which GitHub would show as text"
    return re.sub(r"(!\[[^\]]*\]\([^)]*\))\{[^}]*\}", r"\1", markdown)


def plain_text(output):
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", [])).rstrip()


def readme(page):
    "Markdown of a notebook: text, shown code, and the code's output as text"
    parts, code = [], []
    for cell in page["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(from_root(without_attributes(source)))
        elif not source.startswith("#| hide"):
            code.append(source)
            if cell["outputs"]:
                parts.append("```python\n" + "\n\n".join(code) + "\n```")
                parts.append("```\n" + "\n".join(map(plain_text, cell["outputs"])) + "\n```")
                code = []
    assert not code, "the last shown code has no output"
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(readme(json.loads((ROOT / "nbs" / "index.ipynb").read_text())), end="")
