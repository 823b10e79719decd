"""vLLM's gauges and counters as a Prometheus text page, and how such a page is written.

Source: the exposition format 0.0.4, and vLLM's names and labels.
"""

from __future__ import annotations

from collections.abc import Iterable

from .scheduler import Scheduler

Sample = tuple[dict[str, str], float]
Family = tuple[str, str, str, Iterable[Sample]]  # name, kind, text, samples


def metrics_page(scheduler: Scheduler, *, model: str, requests: int, started: float) -> str:
    """Return the page.

    Args:
        scheduler: Whose state to show.
        model: The label ``model_name``.
        requests: Generate requests received since the start, refused ones included.
        started: When the server started, in seconds since 1970.
    """
    counters = scheduler.counters
    labels = {"engine": "0", "model_name": model}
    finished = [
        ({**labels, "finished_reason": reason}, count)
        for reason, count in counters.finished.items()
    ]
    families: list[Family] = [
        ("process_start_time_seconds", "gauge",
         "Start time of the process since unix epoch in seconds.", [({}, started)]),
        ("vllm:num_requests_running", "gauge", "Number of requests in model execution batches.",
         [(labels, len(scheduler.running))]),
        ("vllm:num_requests_waiting", "gauge", "Number of requests waiting to be processed.",
         [(labels, len(scheduler.waiting))]),
        ("vllm:kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.",
         [(labels, token_usage(scheduler))]),
        ("vllm:num_preemptions_total", "counter", "Running requests put back into the queue.",
         [(labels, counters.preemptions)]),
        ("vllm:prompt_tokens_total", "counter", "Number of prefill tokens processed.",
         [(labels, counters.prompt_tokens)]),
        ("vllm:generation_tokens_total", "counter", "Number of generation tokens processed.",
         [(labels, counters.generated_tokens)]),
        ("vllm:request_success_total", "counter", "Count of successfully processed requests.",
         finished),
        ("arealtrio_embedded:requests_total", "counter", "Generate requests received.",
         [(labels, requests)]),
    ]  # fmt: skip
    return write_page(families)


def token_usage(scheduler: Scheduler) -> float:
    """Return the share in use of a cache that would hold every slot at the model's length.

    There is no cache here; this is what one would hold.
    """
    held = sum(len(sequence.token_ids) for sequence in scheduler.running)
    return held / (scheduler.max_num_seqs * scheduler.max_model_len)


def write_page(families: Iterable[Family]) -> str:
    """Write families in the order given; one without samples keeps its two comment lines."""
    return "".join(_family(*family) for family in families)


def _family(name: str, kind: str, text: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{_labels(labels)} {float(value)}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _labels(labels: dict[str, str]) -> str:
    shown = ",".join(f'{key}="{_escaped(value)}"' for key, value in sorted(labels.items()))
    return f"{{{shown}}}" if shown else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
