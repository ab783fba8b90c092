"""Metrics of this package for `evaluate`, defined here because `evaluate.load` fetches and runs code from the Hub.

They are classes of `evaluate.Metric`: `add_batch(predictions=..., references=...)` as often as there are batches, then
`compute()`; or `compute(predictions=..., references=...)` at once. Nothing is fetched. `keep_in_memory=True` spares the
files in which a metric otherwise collects what it is given.
"""

import math

import numpy as np
from datasets import Features, Value
from evaluate import Metric, MetricInfo

from .blocks import IGNORE_INDEX


class BitsPerByte(Metric):
    """`bits_per_byte`: sum of nats / ln 2 / sum of bytes, NaN without a byte. Models with different tokenizers compare.

    predictions: negative log likelihood in nats of a token, or summed over any piece of text.
    references: bytes of text that it stands for (`tokenization.token_byte_lengths`), specials 0.
    """

    def _info(self) -> MetricInfo:
        return _info(self, "float64")

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        text = sum(references)
        return {"bits_per_byte": math.fsum(predictions) / math.log(2) / text if text else math.nan}


class Perplexity(Metric):
    """`loss`, the mean of nats per token, and `perplexity`, exp(loss). Both depend on the tokenizer.

    predictions: negative log likelihood in nats of a token, or summed over any piece of text.
    references: tokens that it is summed over: 1 for each token by itself.
    """

    def _info(self) -> MetricInfo:
        return _info(self, "float64")

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        tokens = sum(references)
        loss = math.fsum(predictions) / tokens if tokens else math.nan
        # Beyond that a float has no more room.
        return {"loss": loss, "perplexity": math.exp(loss) if not loss > 700 else math.inf}


class Accuracy(Metric):
    """`accuracy`: share of predictions that are right, in [0, 1], NaN without a reference.

    predictions: most likely class or token, by number.
    references: the right ones; those of -100 do not count, as in losses.
    """

    def _info(self) -> MetricInfo:
        return _info(self, "int64")

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        guesses, truth = np.asarray(predictions), np.asarray(references)
        counted = truth != IGNORE_INDEX
        return {"accuracy": float((guesses == truth)[counted].mean()) if counted.any() else math.nan}


def _info(metric: Metric, predictions: str) -> MetricInfo:
    summary, _, inputs = type(metric).__doc__.partition("\n\n")
    return MetricInfo(
        description=summary,
        citation="",
        inputs_description=inputs,
        features=Features({"predictions": Value(predictions), "references": Value("int64")}),
    )
