"""This module holds counters, gauges and histograms as Prometheus reads them. It does not know what is counted.

They are plain numbers and arrays until somebody asks: a step with 256 tokens costs one sorted search, where 256 calls
of an instrument with a lock each would cost as much as the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

__all__ = ["Histogram", "Series"]


class Histogram:
    """Counts of values in buckets.

    Args:
        edges: upper ends of the buckets, ascending; a value equal to one is below it.
    """

    def __init__(self, edges: Sequence[float]) -> None:
        self._edges = np.array(edges, dtype=np.float64)
        self._counts = np.zeros(len(edges) + 1, dtype=np.int64)
        self._sum = 0.0

    def add(self, *values: float) -> None:
        """Count some values."""
        self.add_all(np.array(values))

    def add_all(self, values: npt.NDArray[np.float64]) -> None:
        """Count values; those that are NaN are not there."""
        values = values[~np.isnan(values)]
        if len(values):
            self._counts += np.bincount(np.searchsorted(self._edges, values), minlength=len(self._counts))
            self._sum += float(values.sum())

    @property
    def count(self) -> int:
        """How many values it has."""
        return int(self._counts.sum())

    def sample(self) -> tuple[list[tuple[str, float]], float]:
        """Return [(upper end, values up to it)] and the sum of all values."""
        names = [*map(repr, self._edges.tolist()), "+Inf"]
        return list(zip(names, np.cumsum(self._counts).tolist(), strict=True)), self._sum


class Series:
    """One name with its values by label.

    Args:
        name: without `_total`, which counters get when they are read.
        help_text: one line.
        labels: names of the labels.
        edges: of a histogram's buckets; None: a number.
        is_counter: it never goes down.
    """

    def __init__(
        self,
        name: str,
        help_text: str,
        labels: Sequence[str],
        *,
        edges: Sequence[float] | None = None,
        is_counter: bool = True,
    ) -> None:
        self.name = name
        self._help = help_text
        self._labels = list(labels)
        self._edges = edges
        self._is_counter = is_counter
        self.values: dict[tuple[str, ...], float] = {}
        self._histograms: dict[tuple[str, ...], Histogram] = {}

    def add(self, amount: float, *labels: str) -> None:
        """Add to a counter or gauge."""
        self.values[labels] = self.values.get(labels, 0) + amount

    def set(self, value: float, *labels: str) -> None:
        """Set a gauge."""
        self.values[labels] = value

    def histogram(self, *labels: str) -> Histogram:
        """Return the histogram of these labels."""
        found = self._histograms.get(labels)
        if found is None:
            assert self._edges is not None, f"{self.name} is no histogram"
            found = self._histograms[labels] = Histogram(self._edges)
        return found

    def family(self, common: Mapping[str, str]) -> Metric:
        """Return it as Prometheus reads it.

        Args:
            common: labels that all values have.
        """
        labels, before = [*common, *self._labels], list(common.values())
        if self._edges is not None:
            histograms = HistogramMetricFamily(self.name, self._help, labels=labels)
            for values, histogram in self._histograms.items():
                buckets, total = histogram.sample()
                histograms.add_metric([*before, *values], buckets=buckets, sum_value=total)
            return histograms
        kind = CounterMetricFamily if self._is_counter else GaugeMetricFamily
        numbers = kind(self.name, self._help, labels=labels)
        for values, value in self.values.items():
            numbers.add_metric([*before, *values], value)
        return numbers


class Collector:
    """What a registry asks for all series.

    Args:
        series: all there are.
        common: labels of every value.
    """

    def __init__(self, series: Sequence[Series], common: Mapping[str, str]) -> None:
        self._series = series
        self._common = common

    def collect(self) -> Iterator[Metric]:
        """Yield every series."""
        for series in self._series:
            yield series.family(self._common)
