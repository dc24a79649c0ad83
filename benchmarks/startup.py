"Import and start-up, each as a process of its own: what this package adds to the libraries it stands on."

import subprocess
import sys
import warnings
from pathlib import Path

from benchmarks.common import alternate, arguments, parser, report, table

COMMANDS = {
    "import torch": "import torch",
    "import timm": "import timm",
    "import fastai.vision.all": "import fastai.vision.all",
    "import albumentations": "import os; os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'; import albumentations",
    "fastai.vision.all, timm and albumentations": "import os; os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'; "
    "import fastai.vision.all, timm, albumentations",
    "import ecan_fastai": "import ecan_fastai",
    "import ecan_fastai.all": "import ecan_fastai.all",
}


def main():
    p = parser("startup", __doc__)
    p.set_defaults(rounds=5)
    given = arguments(p)
    warnings.simplefilter("ignore")

    def run(*command):
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    made = {name: run(sys.executable, "-c", code) for name, code in COMMANDS.items()}
    made["ecan_train --help"] = run(str(Path(sys.executable).with_name("ecan_train")), "--help")
    times = alternate(made, given.rounds)
    report(
        "startup",
        "Import and start-up",
        ["Seconds of a whole process, median", table(["", "seconds"], [[n, f"{t:.2f}"] for n, t in times.items()])],
        "cpu",
        given.save,
    )


if __name__ == "__main__":
    main()
