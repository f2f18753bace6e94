"""What the server counts, in Prometheus' words."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from compose.app.server.workshop import Workshop


class Metrics:
    """One registry per server, so that two servers in one process do not count together."""

    def __init__(self, workshop: Workshop) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "compose_http_requests", "HTTP calls", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "compose_http_seconds",
            "Seconds until a call was answered whole",
            ["route"],
            registry=self.registry,
        )
        self.registry.register(_Queue(workshop))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Queue(Collector):
    """The queue as it is at the moment it is asked."""

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop

    def collect(self) -> list[GaugeMetricFamily]:
        jobs, counts = self.workshop.jobs, self.workshop.jobs.counts
        ended = GaugeMetricFamily("compose_jobs_ended", "Jobs ended since the start", labels=["state"])
        for state, count in sorted(counts.items()):
            ended.add_metric([state], count)
        return [
            GaugeMetricFamily("compose_jobs_waiting", "Jobs in the queue", value=jobs.waiting()),
            GaugeMetricFamily("compose_jobs_running", "Jobs being drawn", value=jobs.running()),
            GaugeMetricFamily("compose_pictures", "Pictures drawn since the start", value=jobs.drawn),
            GaugeMetricFamily("compose_draw_seconds", "Seconds spent drawing", value=jobs.seconds),
            ended,
        ]


class Measured:
    """ASGI middleware that counts calls by route (never by address: addresses hold names and ids)."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun = 500, time.perf_counter()

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - begun)
