"""GPU figures through NVML. Without a driver, or where a card does not know a figure, the series is absent, not zero.

The link's bytes are the driver's own counters (Hopper and newer): the older query samples 20 ms per call and direction,
longer than a whole scrape may take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import Metric

from server import metrics
from server.api.families import Labels, family
from server.metrics import Series

Read = Callable[[Any, Any], float]
READS: tuple[tuple[Series, Read], ...] = (
    (metrics.GPU_USE, lambda nvml, card: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100),
    (metrics.GPU_USED, lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card).used),
    (metrics.GPU_TOTAL, lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card).total),
    (metrics.GPU_POWER, lambda nvml, card: nvml.nvmlDeviceGetPowerUsage(card) / 1000),
)


class Gpus:
    """The cards the driver shows. `nvml`: the module `pynvml`, or what stands in for it."""

    def __init__(self, nvml: Any = None) -> None:
        self._nvml, self._cards = nvml, []  # type: tuple[Any, list[Any]]
        try:
            if nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            self._cards = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]
        except Exception:  # no module, no driver, no permission: no GPU series
            self._cards = []

    def families(self, model: str) -> Iterator[Metric]:
        if not self._cards:
            return
        for series, read in READS:
            values: dict[Labels, float] = {}
            for number, card in enumerate(self._cards):
                try:
                    values[str(number),] = read(self._nvml, card)
                except self._nvml.NVMLError:
                    continue
            if values:
                yield family(series, model, values)
        moved: dict[Labels, float] = {
            (str(number), direction): value
            for number, card in enumerate(self._cards)
            for direction, value in self._link_bytes(card).items()
        }
        if moved:
            yield family(metrics.GPU_LINK, model, moved)

    def _link_bytes(self, card: Any) -> dict[str, float]:
        """Received and sent by the card since the driver was loaded; {} where it does not count."""
        nvml = self._nvml
        fields = {"to_device": nvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, "to_host": nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES}
        try:
            values = nvml.nvmlDeviceGetFieldValues(card, list(fields.values()))
        except nvml.NVMLError:
            return {}
        counted = zip(fields, values, strict=True)
        return {name: float(v.value.ullVal) for name, v in counted if v.nvmlReturn == nvml.NVML_SUCCESS}
