"""The shapes SGLang answers ``/generate`` in: pure functions from sequences to plain data.

Every shape has the keys of the recordings in tests/golden/sglang-0.5.23. There is no tokenizer, so
``text`` is empty.
"""

from __future__ import annotations

import msgspec

from .._core.answers import write_pairs
from .experts import as_int32, routed_experts
from .http import json_bytes
from .sequence import Sequence, as_objects
from .sglang_error import Json

ABORTED: Json = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
ABORTED_IN_QUEUE: Json = {"type": "abort", "message": "Abort in waiting queue"}


class Told(msgspec.Struct):
    """What an answer tells about one sequence besides its tokens.

    The prompt costs no time here, so ``queue_time`` is the whole time to the first token.

    Args:
        sequence: What was generated.
        label: The weights' label as the front end knows it now.
        logprobs: Whether logprobs were asked for.
        experts_from: The first token whose experts are told; None tells none.
        received_ts: Unix time at which the request came.
        first_token_s: Seconds from there to the first token; None while there is none.
        end_s: Seconds from there to the end; None while it runs.
    """

    sequence: Sequence
    label: str
    logprobs: bool
    experts_from: int | None
    received_ts: float
    first_token_s: float | None
    end_s: float | None

    def answer(self, start: int = 0) -> Json:
        """Tell everything, with the tokens from ``start`` on."""
        sequence = self.sequence
        first = sequence.prompt_length + start
        return {
            "text": "",
            "output_ids": sequence.token_ids[first:],
            "meta_info": self._meta(start),
        }

    def _meta(self, start: int) -> Json:
        if self.sequence.finish_reason == "abort" and not self.sequence.output_length:
            return self._meta_of_unstarted()
        meta = self._beginning()
        meta |= self._logprobs(start)
        meta |= self._counts()
        meta |= self._experts()
        meta |= self._ending()
        return meta

    def _experts(self) -> Json:
        if self.experts_from is None or not self.sequence.finished:
            return {}
        experts = routed_experts(self.sequence.token_ids, self.experts_from)
        return {"routed_experts": as_int32(experts)}

    def _meta_of_unstarted(self) -> Json:
        """Of a request that was aborted before it ran; SGLang then tells little."""
        return {
            "id": self.sequence.request_id,
            "finish_reason": ABORTED_IN_QUEUE,
            "weight_version": self.label,
            "e2e_latency": self.end_s,
            **self._logprobs(0),
            "completion_tokens": 0,
        }

    def _beginning(self) -> Json:
        sequence, waited = self.sequence, self.first_token_s or 0.0
        return {
            "id": sequence.request_id,
            "finish_reason": finish_reason(sequence),
            "prompt_tokens": sequence.prompt_length,
            "weight_version": self.label,
            "num_retractions": sequence.retractions,
            "storage_prefetch_wait": 0.0,
            "storage_staging_wait": 0.0,
            "forward_entry_time": self.received_ts + waited,
            "prefill_finished_time": self.received_ts + waited,
            "queue_time": waited,
        }

    def _logprobs(self, start: int) -> Json:
        if not self.logprobs:
            return {}
        sequence = self.sequence
        ids = sequence.token_ids[sequence.prompt_length + start :]
        written = write_pairs(sequence.logprobs[start:], ids, json_bytes)
        return {
            "input_token_logprobs": [],
            "output_token_logprobs": msgspec.Raw(written),
            "output_token_logprobs_length": sequence.output_length,
        }

    def _counts(self) -> Json:
        sequence = self.sequence
        counts: Json = {
            "reasoning_tokens": 0,
            "completion_tokens": sequence.output_length,
            "cached_tokens": 0,
        }
        if sequence.finished:
            counts["weight_versions"] = as_objects(sequence.spans)
        counts["cached_tokens_details"] = counts["dp_rank"] = None
        return counts

    def _ending(self) -> Json:
        if self.end_s is None:
            return {}
        first_s = self.end_s if self.first_token_s is None else self.first_token_s
        end_ts, decoding_s = self.received_ts + self.end_s, self.end_s - first_s
        decoded = self.sequence.output_length - 1
        return {
            "e2e_latency": self.end_s,
            "request_received_ts": self.received_ts,
            "first_token_latency": first_s,
            "api_server_dispatch_finish_ts": self.received_ts,
            "request_finished_ts": end_ts,
            "decode_throughput": decoded / decoding_s if decoding_s > 0 else 0.0,
            "response_sent_to_client_ts": end_ts,
        }


def finish_reason(sequence: Sequence) -> Json | None:
    """SGLang's object; null while it runs."""
    match sequence.finish_reason:
        case "length":
            return {"type": "length", "length": sequence.output_length}
        case "stop":
            return {"type": "stop", "matched": sequence.token_ids[-1]}
        case "abort":
            return ABORTED
    return None
