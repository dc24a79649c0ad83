"A progress bar for whatever can take longer than a few seconds."

import sys

from tqdm.auto import tqdm


def progress(
    items,  # Any iterable
    about: str,  # What is done with them, as "read images"
    total: int | None = None,  # How many there are, where `items` does not know
):
    "Yield `items`; from the second second on, a bar on the error stream shows how far they are"
    every = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(items, desc=about, total=total, delay=2, leave=False, mininterval=every, maxinterval=10 * every)
