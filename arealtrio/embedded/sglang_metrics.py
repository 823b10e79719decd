"""SGLang's gauges and counters as a Prometheus text page.

Source: the names and labels of tests/golden/sglang-0.5.23/metrics.prom.
"""

from __future__ import annotations

from .metrics import Family, token_usage, write_page
from .scheduler import Scheduler


def sglang_metrics_page(scheduler: Scheduler, *, model: str, requests: int) -> str:
    """Return the page, as a server with ``--enable-metrics`` shows it.

    Requests that its front end holds back are in none of these numbers.

    Args:
        scheduler: Whose state to show.
        model: The label ``model_name``.
        requests: Generate requests received since the start, refused ones included.
    """
    counters = scheduler.counters
    front = {"engine_type": "unified", "model_name": model}
    rank = {**front, "moe_ep_rank": "0", "pp_rank": "0", "tp_rank": "0"}
    retracted = sum(sequence.retractions > 0 for sequence in scheduler.waiting)
    finished = counters.finished["stop"] + counters.finished["length"]
    families: list[Family] = [
        ("sglang:num_running_reqs", "gauge", "The number of running requests.",
         [(rank, len(scheduler.running))]),
        ("sglang:num_queue_reqs", "gauge", "The number of requests in the waiting queue.",
         [(rank, len(scheduler.waiting))]),
        ("sglang:num_retracted_reqs", "gauge", "The number of retracted requests.",
         [(rank, retracted)]),
        ("sglang:token_usage", "gauge", "The token usage.", [(rank, token_usage(scheduler))]),
        ("sglang:prompt_tokens_total", "counter", "Number of prefill tokens processed.",
         [(front, counters.prompt_tokens)]),
        ("sglang:generation_tokens_total", "counter", "Number of generation tokens processed.",
         [(front, counters.generated_tokens)]),
        ("sglang:num_aborted_requests_total", "counter", "Number of requests aborted.",
         [(front, counters.finished["abort"])]),
        ("arealtrio_embedded:requests_total", "counter", "Generate requests received.",
         [(front, requests)]),
    ]  # fmt: skip
    if finished:  # not there before the first
        families.append(("sglang:num_requests_total", "counter", "Number of requests processed.",
                         [(front, finished)]))  # fmt: skip
    return write_page(families)
