"""How several sources share the blocks of a run: by weight, and by number alone."""

import numpy as np

from .sources import DataError


# A mixture repeats after this many blocks, so weights are kept to a thousandth.
MIXTURE_PERIOD = 1000


def mixture_pattern(weights: list[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How sources share each run of `MIXTURE_PERIOD` blocks.

    Returns:
        The source of each slot, how many earlier slots that source has, and how many slots each source has in all.

    Raises:
        DataError: a weight is too small to get a slot.
    """
    exact = np.array(weights) / sum(weights) * MIXTURE_PERIOD
    counts = np.floor(exact).astype(int)
    # The largest remainders get the slots that rounding down left over.
    counts[np.argsort(counts - exact, kind="stable")[: MIXTURE_PERIOD - counts.sum()]] += 1
    if not counts.all():
        raise DataError(
            f"data.sources: weight {min(weights)} is below 1/{MIXTURE_PERIOD} of the sum of {weights}: raise it"
        )
    ranks = np.concatenate([np.arange(count) for count in counts])
    sources = np.repeat(np.arange(len(weights)), counts)
    order = np.argsort((ranks + 0.5) / counts[sources], kind="stable")
    return sources[order], ranks[order], counts
