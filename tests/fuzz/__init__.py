"""Bad input for everything that the package reads: `python -m tests.fuzz` draws it from a seed, tries it, and prints
what came of it. `trial` judges one outcome and runs many; the other modules draw input, a kind each."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # weights that are not here are not fetched
