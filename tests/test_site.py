"Pages, README and sidebar: links resolve, shown values are stored, and what is generated is up to date."

import ast
import base64
import importlib
import re
import runpy
from pathlib import Path

import pytest
import setuptools
import yaml
from fastcore.nbio import read_nb
from nbdev.doclinks import NbdevLookup

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
REPOSITORY = "https://github.com/ecan-fastai/ecan_fastai"
PAGES = sorted(p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
TEXTS = [*PAGES, *(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"))]
COMMAND = re.compile(r"^(ecan_\w+)=([\w.]+):(\w+)$")

# what pages do not fulfil yet; these lists may only get shorter
WITHOUT_OUTPUT: set = set()
OTHER_INSTALL: set = set()
UNKNOWN_COMMANDS: set = set()


def name(path):
    return str(path.relative_to(ROOT))


def cells(path, kind):
    return [c for c in read_nb(path).cells if c.cell_type == kind]


def directives(cell):
    return {d[0] for line in cell.source.splitlines() if line.startswith("#|") and (d := re.findall(r"\w+", line))}


def markdown(path):
    "Text of a page, its stored Markdown output included"
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    parts = []
    for cell in read_nb(path).cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        for output in cell.get("outputs", []):
            parts.append("".join(output.get("data", {}).get("text/markdown", [])))
    return "\n\n".join(parts)


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchor(heading):
    "Identifier that Pandoc and Quarto give to a heading"
    heading = re.sub(r"\]\([^)]*\)|[`*\[]", "", heading).lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", heading).strip()))


def anchors(path):
    "Headings of a page, and names whose documentation stands on it"
    text = re.sub(r"^```.*?^```", "", markdown(path), flags=re.S | re.M)
    found = {anchor(h) for h in re.findall(r"^#+ (.*)$", text, flags=re.M)}
    if path.suffix == ".ipynb":
        exported = [ast.parse(c.source) for c in cells(path, "code") if directives(c) & {"export", "exports"}]
        found |= {d.name.lower() for tree in exported for d in tree.body if hasattr(d, "name")}
    return found


def broken_links(path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(markdown(path))):
        if link.startswith(f"{REPOSITORY}/blob/main/"):
            target, page = "", ROOT / link.removeprefix(f"{REPOSITORY}/blob/main/")
        elif re.match(r"https?:|mailto:", link):
            continue
        else:
            file, _, target = link.partition("#")
            page = (path.parent / file).resolve() if file else path
        if not page.exists() or target and target not in anchors(page):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_resolve(path):
    assert not broken_links(path)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading, with `code`\n[a](#a-heading-with-code) [b](#nowhere) [c](no.md) `[d](no.md)`")
    assert broken_links(page) == ["#nowhere", "no.md"]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_no_link_lies_in_another(path):
    "The site makes a link of every name that it knows: `sample_faces`"
    linked = NbdevLookup().linkify(markdown(path))
    assert not re.findall(r"\[[^\[\]]*\[`[^`]*`\]\([^)]*\)[^\]]*\]\(.*", linked)


def shown(cell):
    return not directives(cell) & {"hide", "hide_output", "export", "exports", "exporti", "default_exp", "notest"}


def is_silent(statement):
    "A call whose value is None by its nature: a test, or documentation that the site's build adds"
    called = statement.value.func if isinstance(statement.value, ast.Call) else None
    return isinstance(called, ast.Name) and called.id.startswith(("test_", "expect_", "show_doc"))


def without_output(path):
    "Shown cells that end in an expression and have no stored output"
    found = []
    for cell in cells(path, "code"):
        statements = ast.parse(cell.source).body if shown(cell) else []
        if statements and isinstance(statements[-1], ast.Expr) and not is_silent(statements[-1]) and not cell.outputs:
            found.append(cell.source.splitlines()[-1])
    return found


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_shown_values_are_stored(path):
    assert bool(without_output(path)) == (name(path) in WITHOUT_OUTPUT), without_output(path)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_outputs_hold_no_paths_or_warnings(path):
    stored = " ".join(str(c.outputs) for c in cells(path, "code"))
    assert not re.findall(r"(?:/root|/home/\w+|/tmp|/work)/\S{0,40}|\w*Warning\b", stored)


def has_image(output):
    return any(kind.startswith("image/") for kind in output.get("data", {}))


def without_alt(path):
    "Figures and images of a page without a text for readers who cannot see them"
    figures = [c.source for c in cells(path, "code") if any(map(has_image, c.outputs))]
    images = [i for c in cells(path, "markdown") for i in re.findall(r"!\[.*", without_code(c.source))]
    unsaid = [figure.splitlines()[-1] for figure in figures if not re.match(r'#\| fig-alt: "[^"]+"\n', figure)]
    return unsaid + [image for image in images if not re.search(r'\)\{fig-alt="[^"]+"\}', image)]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_images_have_alt_text(path):
    assert not without_alt(path)


def width(output):
    "Pixels of a stored figure, and what its size in inches and its dpi make"
    pixels = int.from_bytes(base64.b64decode("".join(output["data"]["image/png"]))[16:20], "big")
    return pixels, float(re.search(r"size ([\d.]+)x", "".join(output["data"]["text/plain"]))[1])


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_figures_have_the_size_that_their_cell_gives(path):
    "The format `retina` doubles it"
    widths = [width(o) for c in cells(path, "code") for o in c.outputs if has_image(o)]
    assert not [(pixels, size) for pixels, size in widths if pixels > 1.5 * size]


def hrefs(entry):
    "Pages of a sidebar, in order"
    if isinstance(entry, list):
        return [h for e in entry for h in hrefs(e)]
    return hrefs(entry["contents"]) if "contents" in entry else [entry["href"]]


def sidebar():
    return yaml.safe_load((NBS / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]


def test_every_page_is_in_the_sidebar_once():
    assert sorted(hrefs(sidebar())) == sorted(p.relative_to(NBS).as_posix() for p in PAGES)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_begins_with_title_and_subtitle(path):
    first = read_nb(path).cells[0]
    assert first.cell_type == "markdown" and re.match(r"# .+\n\n> .+", first.source)


LONGEST_CELL = 40  # lines, the directive included


def exported(path):
    return [c.source for c in cells(path, "code") if directives(c) & {"export", "exports", "exporti"}]


def public_definitions(source):
    definitions = (d for d in ast.parse(source).body if isinstance(d, (ast.FunctionDef, ast.ClassDef)))
    return [d.name for d in definitions if not d.name.startswith("_")]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_an_exported_cell_is_short(path):
    lines = [source.splitlines() for source in exported(path)]
    assert not [f"{len(cell)} lines: {cell[1]}" for cell in lines if len(cell) > LONGEST_CELL]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_an_exported_cell_has_one_public_definition(path):
    assert not [names for names in map(public_definitions, exported(path)) if len(names) > 1]


@pytest.mark.parametrize(
    "words, page",
    [
        ("own folder", "own_folder"),
        ("fine-tune", "fine_tune"),
        ("webcam", "use_a_model"),
        ("onnx", "use_a_model"),
        ("unequal classes", "unequal_classes"),
        ("reproduce the paper", "reproduce"),
    ],
)
def test_search_finds_a_task_by_its_words(words, page):
    assert words in markdown(NBS / "tutorials" / f"{page}.ipynb").lower()


def test_tasks_end_in_a_picture():
    tasks = next(s for s in sidebar() if s.get("section") == "Tasks")
    for page in hrefs(tasks):
        last = cells(NBS / page, "code")[-1]
        assert any("image/png" in o.get("data", {}) for o in last.outputs), page


# README and setup.py


def readme_script():
    return runpy.run_path(str(ROOT / ".ci" / "readme.py"))


def test_readme_is_made_from_the_home_page():
    made = readme_script()["readme"](read_nb(NBS / "index.ipynb"))
    assert (ROOT / "README.md").read_text() == made, "run: python .ci/readme.py > README.md"


def test_readme_has_no_attributes_of_images():
    cell = {"cell_type": "markdown", "source": '![A face](images/a.png){fig-alt="A smiling face"}\n\n`{a}`'}
    assert readme_script()["readme"]({"cells": [cell]}) == "![A face](nbs/images/a.png)\n\n`{a}`\n"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 700


def test_ci_does_what_readme_tells_a_new_user():
    develop = (ROOT / "README.md").read_text().partition("## Develop")[2]
    told = re.search(r"```sh\n(.*?)```", develop, re.S)[1].splitlines()[1]  # after the line that clones
    done = (ROOT / ".ci" / "run").read_text().replace(" -q", "")
    assert all(command in done for command in told.split(" && "))


def test_package_index_shows_links_that_lead_to_the_repository(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    links = re.findall(r"\]\(([^)]+)\)", without_code(given["long_description"]))
    assert links and all(link.startswith("https://") for link in links)
    own = [link.removeprefix(REPOSITORY) for link in links if re.match(rf"{REPOSITORY}/(blob|raw)/", link)]
    assert len(own) > 10 and all((ROOT / re.sub(r"^/(blob|raw)/main/", "", link)).exists() for link in own)


INSTALL = re.compile(r"""ecan_fastai\b(?!\[)|"ecan_fastai\[[\w,]+\]"|-e '\.\[dev\]'""")


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_installing_is_shown_in_one_way(path):
    wrong = [c for c in re.findall(r"pip install ([^`\n]*)", markdown(path)) if not INSTALL.match(c)]
    assert bool(wrong) == (name(path) in OTHER_INSTALL), wrong


# Commands


def scripts():
    "Console scripts by name, as settings.ini declares them"
    line = re.search(r"^console_scripts = (.*)$", (ROOT / "settings.ini").read_text(), re.M)[1]
    found = [COMMAND.match(entry).groups() for entry in line.split()]
    return {script: getattr(importlib.import_module(module), function) for script, module, function in found}


def options(text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def help_of(script, capsys):
    with pytest.raises(SystemExit):
        scripts()[script](["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("script", scripts())
def test_page_of_commands_has_every_option(script, capsys):
    page = markdown(NBS / "commands.ipynb")
    section = re.search(rf"^## {script}\n(.*?)(?=^## |\Z)", page, re.S | re.M)
    assert section and options(section[1]) == options(help_of(script, capsys)), "run nbs/commands.ipynb again"


def test_shown_commands_exist_with_their_options(capsys):
    helps = {script: options(help_of(script, capsys)) for script in scripts()}
    unknown = set()
    for path in TEXTS:
        for block in re.findall(r"^```sh\n(.*?)^```", markdown(path), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                script, *words = line.split() or [""]
                if script.startswith("ecan_") and script not in helps:
                    unknown.add(script)
                if script.startswith("ecan_"):
                    unknown |= {f"{script} {o}" for o in options(" ".join(words)) - helps.get(script, set())}
    assert unknown == UNKNOWN_COMMANDS
