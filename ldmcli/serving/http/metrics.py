"""Counters as Prometheus reads them. Format: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from collections import Counter

from ldmcli.serving.work import Work

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """What was answered."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer; `path` is that of a route, of which there are few."""
        self._answers[path, status] += 1
        self._seconds[path] += seconds  # type: ignore[assignment]

    def text(self, work: Work, held: int) -> str:
        """All counters; `held` is the bytes of the bodies at work."""
        now = work.progress()
        lines = ["# HELP ldm_http_requests_total Requests answered.", "# TYPE ldm_http_requests_total counter"]
        for (path, status), count in sorted(self._answers.items()):
            lines.append(f'ldm_http_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += ["# HELP ldm_http_seconds_total Time to answer them.", "# TYPE ldm_http_seconds_total counter"]
        for path, seconds in sorted(self._seconds.items()):
            lines.append(f'ldm_http_seconds_total{{path="{path}"}} {seconds:.3f}')
        for name, kind, about, value in (
            ("pictures_total", "counter", "Pictures drawn.", now.drawn),
            ("pictures_failed_total", "counter", "Pictures that could not be drawn.", now.failed),
            ("jobs_waiting", "gauge", "Jobs in the queue.", now.queued),
            ("jobs_drawing", "gauge", "Jobs being drawn.", len(now.jobs)),
            ("models_loaded", "gauge", "Models in memory.", sum(each.loaded for each in work.models())),
            ("http_held_bytes", "gauge", "Bytes of the bodies of requests at work.", held),
        ):
            lines += [f"# HELP ldm_{name} {about}", f"# TYPE ldm_{name} {kind}", f"ldm_{name} {value}"]
        return "\n".join([*lines, ""])
