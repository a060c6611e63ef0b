"""What the server has done, for Prometheus. Names and units follow https://prometheus.io/docs/practices/naming."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from offload_sirius.serve.figures import Memory
from offload_sirius.serve.worker import Worker

PREFIX = "offload_sirius_"


class Metrics(Collector):
    """Requests by endpoint and status are counted here, all else is read from the worker's counters when it is asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.memory: Memory | None = None
        """None until the model is loaded."""
        self._registry = CollectorRegistry()
        self._requests = Counter(
            PREFIX + "requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=self._registry
        )
        self._registry.register(self)

    def count(self, endpoint: str, status: int) -> None:
        """A request has been answered."""
        self._requests.labels(endpoint=endpoint, status=str(status)).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        figures, worker = self._worker.figures, self._worker
        tokens = CounterMetricFamily(PREFIX + "tokens", "Tokens by kind.", labels=["kind"])
        tokens.add_metric(["prompt"], figures.prompt_tokens)
        tokens.add_metric(["cached"], figures.cached_tokens)
        tokens.add_metric(["generated"], figures.generated_tokens)
        yield tokens
        answers = CounterMetricFamily(PREFIX + "answers", "Answers by how they ended.", labels=["reason"])
        for reason, number in dict(figures.answers).items():
            answers.add_metric([reason], number)
        yield answers
        yield _gauge("queue_length", "Requests that wait for their turn.", worker.num_waiting)
        yield _gauge("active_answers", "Answers that are being written.", worker.num_active)
        yield _gauge("max_answers", "Answers that can be written at once.", worker.max_answers)
        rates = figures.rates
        yield _gauge("tokens_per_second", "Tokens generated in the last seconds.", rates.tokens_per_second or 0.0)
        yield _gauge("average_advancement_length", "Tokens that a window gave, over all answers.", figures.mean_aal)
        yield _counter("link_bytes", "Bytes of weights that the link has carried.", figures.link.copied_nbytes)
        yield _counter("link_busy_seconds", "Time in which the link has carried something.", figures.link.busy_seconds)
        yield _gauge("link_busy_share", "Share of the last seconds in which it did.", rates.link_busy_share or 0.0)
        if self.memory is not None:
            yield _bill("device_plan_bytes", "Device memory by what it is planned for.", self.memory.device_bill)
            yield _bill("host_plan_bytes", "Host memory by what it is planned for.", self.memory.host_bill)


def _gauge(name: str, text: str, number: float | None) -> Metric:
    """Without a sample where there is no number yet."""
    gauge = GaugeMetricFamily(PREFIX + name, text)
    if number is not None:
        gauge.add_metric([], number)
    return gauge


def _counter(name: str, text: str, number: float) -> Metric:
    counter = CounterMetricFamily(PREFIX + name, text)
    counter.add_metric([], number)
    return counter


def _bill(name: str, text: str, bill: Mapping[str, int]) -> Metric:
    gauge = GaugeMetricFamily(PREFIX + name, text, labels=["purpose"])
    for purpose, nbytes in bill.items():
        gauge.add_metric([purpose], nbytes)
    return gauge
