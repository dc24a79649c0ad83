"The package's modules import downwards only: from what stands above them in this list, and no private name."

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ecan_fastai

ROOT = Path(ecan_fastai.__file__).parent
ROOMS = """progress fastai_internals config runfiles weights augment data layers losses model callbacks learner metrics
           readers.records readers.folder readers.fer2013 readers.rafdb readers.ferplus
           readers.affectnet readers.expw readers.ckplus
           readers.factory sample loaders check inference interpret video detector app runstate runresults runs
           experiments cli
           all""".split()


def source(room):
    return ROOT / f"{room.replace('.', '/')}.py"


def imports(room):
    "(module of this package, name) of every import, also of those inside functions"
    package = ["ecan_fastai", *room.split(".")[:-1]]
    for node in ast.walk(ast.parse(source(room).read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names if a.name.startswith("ecan_fastai"))
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        if module.startswith("ecan_fastai"):
            yield from ((module, a.name) for a in node.names)


def test_every_module_has_its_place():
    found = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in ROOT.rglob("*.py")}
    assert found - {"__init__", "readers.__init__", "_modidx"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_from_rooms_above_it_and_no_private_name(room):
    above = {f"ecan_fastai.{r}" for r in ROOMS[: ROOMS.index(room)]}
    for module, name in imports(room):
        assert (
            module in above
            or (module, name) == ("ecan_fastai", "__version__")
            or module == "ecan_fastai"
            and name is None
        ), f"{room} imports {name} from {module}"
        assert name is None or not name.startswith("_") or name == "__version__", (
            f"{room} takes the private {name} from {module}"
        )


@pytest.mark.slow
def test_every_module_can_be_imported_alone():
    code = """
import importlib, os, sys, warnings
warnings.simplefilter("ignore")
import albumentations, fastai.vision.all, sklearn, timm     # once, for all of the processes below
for room in sys.argv[1:]:
    if os.fork() == 0:
        try: importlib.import_module(f"ecan_fastai.{room}")
        except BaseException as e: print(f"{room}: {e!r}", flush=True); os._exit(1)
        os._exit(0)
    if os.wait()[1]: sys.exit(1)
"""
    done = subprocess.run([sys.executable, "-c", code, *ROOMS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
