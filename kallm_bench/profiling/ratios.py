"""How one model's figures stand to another's that were measured in turn with them.

The samples of one round were taken one after the other, so that what slowed the one slowed the other too: of each round
there is a ratio, and their spread says how well it is known. The interval is Student's, of the mean of the logarithms.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from kallm_bench.records import Metric
from kallm_bench.records.statistics import mean_interval


def ratios(first: Sequence[Metric], second: Sequence[Metric]) -> list[Metric]:
    """The second model's figures over the first's, of all that both have and that are not zero.

    Returns:
        "ratio/prefill_tokens_per_second"; with "ratio_low/..." and "ratio_high/...", the ends of the 95 % interval over
        rounds, where there are samples.
    """
    known = {metric.name: metric for metric in first}
    return [each for metric in second if metric.name in known for each in _ratio(known[metric.name], metric)]


def _ratio(below: Metric, above: Metric) -> list[Metric]:
    if not below.value or not above.value:
        return []
    rounds = list(zip(above.samples, below.samples, strict=False))
    if len(rounds) < 2 or len(above.samples) != len(below.samples):
        return [Metric(f"ratio/{above.name}", above.value / below.value)]
    each = [mine / other for mine, other in rounds]
    logarithms = [math.log(ratio) for ratio in each]
    low, high = mean_interval(logarithms) or (math.nan, math.nan)
    middle = math.exp(statistics.fmean(logarithms))
    ends = [("ratio_low", math.exp(low)), ("ratio_high", math.exp(high))]
    return [
        Metric(f"ratio/{above.name}", middle, len(each), each),
        *(Metric(f"{name}/{above.name}", value, len(each)) for name, value in ends),
    ]
