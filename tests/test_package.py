import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import ecan_fastai

ROOT = Path(__file__).parent.parent


def settings():
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    return ini["DEFAULT"]


def test_version_stands_once():
    assert ecan_fastai.__version__ == settings()["version"]
    assert f"## {ecan_fastai.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_description_is_the_same_in_both_places():
    assert (
        re.search(r'^description = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
        == settings()["description"]
    )


def test_setup_knows_the_repositorys_address():
    assert (
        re.search(r'^pages = "(.*?)"', (ROOT / "setup.py").read_text(), re.M)[1]
        == re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    )


def test_public_names():
    from ecan_fastai.loaders import ExpressionDataLoaders

    assert all(callable(getattr(ExpressionDataLoaders, f"from_{k}")) for k in ("folder", "df", "csv", "fer2013"))


@pytest.mark.slow
def test_all_gives_everything_to_a_notebook():
    names = "ecan_learner check_data Predictor read_faces ExpressionDataLoaders TwoView ECANLoss Learner RunConfig"
    code = f"from fastai.vision.all import *\nfrom ecan_fastai.all import *\nassert {' and '.join(names.split())}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def run(code):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


@pytest.mark.slow
def test_import_asks_no_network():
    done = run(
        "import sys\nseen = []\nsys.addaudithook(lambda event, args: seen.append(event) if event in "
        "('socket.connect', 'socket.getaddrinfo', 'socket.sendto') else None)\n"
        "import ecan_fastai.all\nsys.exit(' '.join(seen) or 0)"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [["--help"], ["sample", "--epochs", "0"], ["sample", "--level", "fierce"]])
def test_help_and_wrong_arguments_are_answered_before_the_libraries_are_imported(args):
    done = run(
        f"import sys\nfrom ecan_fastai.cli import ecan_train\ntry: ecan_train({args})\nexcept SystemExit: "
        "pass\nsys.exit(' '.join(m for m in ('torch', 'numpy', 'fastai') if m in sys.modules) or 0)"
    )
    assert done.returncode == 0, done.stderr
    assert "ecan_train" in done.stdout + done.stderr


def test_what_is_imported_is_declared():
    "Of other packages, in the requirements or, where an import stands in a function, in those of an extra"
    distributions = packages_distributions()
    required = {k: v for k, v in settings().items() if k.endswith("requirements")}
    names = {k: {re.split(r"[<>=\[]", r)[0].lower().replace("-", "_") for r in v.split()} for k, v in required.items()}
    extras = set().union(*names.values())
    for file in (ROOT / "ecan_fastai").rglob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {m.split(".")[0] for m in modules} - sys.stdlib_module_names - {"ecan_fastai"}:
                declared = names["requirements"] if node in tree.body else extras
                found = {d.lower().replace("-", "_") for d in distributions[top]}
                assert found & declared, f"{file.name} imports {top}, which settings.ini does not require"
