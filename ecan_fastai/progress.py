"A progress bar for steps that can take longer than a few seconds."

import sys

from tqdm.auto import tqdm


def progress(
    items,  # Any iterable
    description: str,  # What is done with them, such as "read images"
    total: int | None = None,  # Number of items, if `items` has no length
):
    "Yield `items`, with a progress bar on stderr after two seconds"
    every = 0.1 if sys.stderr.isatty() else 20.0
    return tqdm(items, desc=description, total=total, delay=2, leave=False, mininterval=every, maxinterval=10 * every)
