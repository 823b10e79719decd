"""The shapes vLLM answers in: pure functions from sequences to plain data.

Every shape has the keys of the recordings in tests/golden/vllm-0.32.0. There is no tokenizer, so
``text`` is empty, and so is a token's, unless ``return_tokens_as_token_ids`` asks for ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import msgspec

from .._core.answers import write_records
from .experts import as_npy, routed_experts
from .http import json_bytes
from .sequence import Sequence, as_objects
from .vllm_request import GenerateRequest

Json = dict[str, Any]
FINGERPRINT = "arealtrio-embedded"


class Answer(msgspec.Struct, frozen=True):
    """What all parts of one answer share.

    Args:
        request_id: The id the client is told.
        model: The served model's name.
        created: Unix time in whole seconds.
        request: What was asked.
        sequences: Its sequences, prompt by prompt, each prompt ``n`` times.
        tells_experts: Whether it tells which experts tokens went through.
    """

    request_id: str
    model: str
    created: int
    request: GenerateRequest
    sequences: SequenceOf[Sequence]
    tells_experts: bool = False

    def experts(self, sequence: Sequence) -> str | None:
        """The experts of a sequence that has ended; None of one that was not begun."""
        if not (self.tells_experts and sequence.finished and sequence.output_length):
            return None
        return as_npy(routed_experts(sequence.token_ids, self.request.experts_from))

    def usage(self) -> Json:
        """Count tokens; a prompt counts once, however many answers it has."""
        prompt = sum(map(len, self.request.prompts))
        completion = sum([sequence.output_length for sequence in self.sequences])
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
        }

    def full_usage(self) -> Json:
        """As in an answer that is no stream."""
        return {**self.usage(), "prompt_tokens_details": None, "completion_tokens_details": None}


def completion(answer: Answer) -> Json:
    """The answer of ``/v1/completions``."""
    choices = [_completion_choice(answer, i, s) for i, s in enumerate(answer.sequences)]
    return {
        "id": answer.request_id,
        "object": "text_completion",
        "created": answer.created,
        "model": answer.model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": answer.full_usage(),
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _completion_choice(answer: Answer, index: int, sequence: Sequence) -> Json:
    named = answer.request.return_token_ids
    return {
        "index": index,
        "text": "",
        "logprobs": _completion_logprobs(answer.request, sequence, 0, sequence.output_length),
        "finish_reason": sequence.finish_reason,
        "stop_reason": sequence.stop_reason,
        "token_ids": sequence.output_ids if named else None,
        "prompt_logprobs": None,
        "prompt_token_ids": sequence.prompt_ids if named else None,
        "routed_experts": answer.experts(sequence),
    }


@dataclass(slots=True)
class Cursor:
    """How far one sequence of a stream was sent.

    Args:
        index: Of the sequence in its answer.
        sent: Tokens.
        characters: Characters of these tokens as written, where the next ``text_offset`` starts.
        ended: Whether the chunk with the finish reason was sent.
    """

    index: int
    sent: int = 0
    characters: int = 0
    ended: bool = False


def completion_chunk(answer: Answer, cursor: Cursor) -> Json:
    """What one sequence got since the last chunk, as an event of a ``/v1/completions`` stream."""
    sequence, named = answer.sequences[cursor.index], answer.request.return_token_ids
    start, end = cursor.sent, sequence.output_length
    choice = {
        "index": cursor.index,
        "text": "",
        "logprobs": _completion_logprobs(answer.request, sequence, start, end, cursor.characters),
        "finish_reason": sequence.finish_reason,
        "stop_reason": sequence.stop_reason,
        "prompt_token_ids": sequence.prompt_ids if named and not start else None,
        "token_ids": _output(sequence, start, end) if named else None,
    }
    cursor.characters += _length(answer.request, _output(sequence, start, end))
    _advance(cursor, sequence)
    return {**_completion_head(answer), "choices": [choice]}


def _advance(cursor: Cursor, sequence: Sequence) -> None:
    cursor.sent = sequence.output_length
    cursor.ended = sequence.finished


def completion_usage_chunk(answer: Answer) -> Json:
    """The event that ends a ``/v1/completions`` stream which asked for its usage."""
    return {
        **_completion_head(answer),
        "choices": [],
        "usage": answer.usage(),
        "system_fingerprint": FINGERPRINT,
    }


def _completion_head(answer: Answer) -> Json:
    return {
        "id": answer.request_id,
        "object": "text_completion",
        "created": answer.created,
        "model": answer.model,
    }


def _output(sequence: Sequence, start: int, end: int) -> list[int]:
    first = sequence.prompt_length
    return sequence.token_ids[first + start : first + end]


def _completion_logprobs(
    request: GenerateRequest, sequence: Sequence, start: int, end: int, offset: int = 0
) -> Json | None:
    """Four lists of equal length; text offsets count the characters of the tokens as written."""
    if request.params.logprobs is None:
        return None
    ids = _output(sequence, start, end)
    return {
        "text_offset": _offsets(request, ids, offset),
        "token_logprobs": sequence.logprobs[start:end],
        "tokens": [_written(request, token_id) for token_id in ids],
        "top_logprobs": [_top(request, sequence, at) for at in range(start, end)],
    }


def chat(answer: Answer) -> Json:
    """The answer of ``/v1/chat/completions``."""
    named = answer.request.return_token_ids
    return {
        **_completion_head(answer),
        "object": "chat.completion",
        "choices": [_chat_choice(answer, i, s) for i, s in enumerate(answer.sequences)],
        "service_tier": None,
        "system_fingerprint": FINGERPRINT,
        "usage": answer.full_usage(),
        "prompt_logprobs": None,
        "prompt_token_ids": answer.sequences[0].prompt_ids if named else None,
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


def _chat_choice(answer: Answer, index: int, sequence: Sequence) -> Json:
    message = {"role": "assistant", "content": "", "refusal": None, "annotations": None,
               "audio": None, "function_call": None, "reasoning": None}  # fmt: skip
    return {
        "index": index,
        "message": message,
        "logprobs": _chat_logprobs(answer.request, sequence),
        "finish_reason": sequence.finish_reason,
        "stop_reason": sequence.stop_reason,
        "token_ids": sequence.output_ids if answer.request.return_token_ids else None,
        "routed_experts": answer.experts(sequence),
    }


def _chat_logprobs(request: GenerateRequest, sequence: Sequence) -> Json | None:
    """Without the best candidates, which no client of this server asks for."""
    if request.params.logprobs is None:
        return None
    return {
        "content": [
            {"token": _written(request, token_id), "logprob": logprob, "bytes": [],
             "top_logprobs": []}
            for token_id, logprob in zip(sequence.output_ids, sequence.logprobs, strict=True)
        ]
    }  # fmt: skip


def _length(request: GenerateRequest, ids: Iterable[int]) -> int:
    return sum(len(_written(request, token_id)) for token_id in ids)


def _offsets(request: GenerateRequest, ids: Iterable[int], offset: int) -> list[int]:
    offsets = []
    for token_id in ids:
        offsets.append(offset)
        offset += len(_written(request, token_id))
    return offsets


def _top(request: GenerateRequest, sequence: Sequence, at: int) -> dict[str, float]:
    token_id = sequence.token_ids[sequence.prompt_length + at]
    top = {_written(request, token_id): sequence.logprobs[at]}
    for candidate in sequence.top_logprobs[at]:
        top.setdefault(_written(request, candidate.token_id), candidate.logprob)
    return top


def _written(request: GenerateRequest, token_id: int) -> str:
    return f"token_id:{token_id}" if request.tokens_as_ids else ""


def tokens(answer: Answer) -> Json:
    """The answer of ``/inference/v1/generate``."""
    choices = [_tokens_choice(answer, index, 0) for index in range(len(answer.sequences))]
    return {
        "request_id": answer.request_id,
        "model": answer.model,
        "created": answer.created,
        "usage": answer.full_usage(),
        "prompt_logprobs": None,
        "prompt_token_id_logprobs": None,
        "prompt_token_ids": None,
        "mm_placeholders": None,
        "metrics": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "output_mode": "tokens",
        "choices": choices,
    }


def tokens_chunk(answer: Answer, cursor: Cursor) -> Json:
    """What one sequence got since the last chunk, as an event of a generate stream."""
    choice = _tokens_choice(answer, cursor.index, cursor.sent)
    _advance(cursor, answer.sequences[cursor.index])
    return {
        "request_id": answer.request_id,
        "usage": None,
        "output_mode": "tokens",
        "choices": [choice],
    }


def tokens_usage_chunk(answer: Answer) -> Json:
    """The event that ends a generate stream which asked for its usage."""
    return {
        "request_id": answer.request_id,
        "usage": answer.usage(),
        "output_mode": "tokens",
        "choices": [],
    }


def _tokens_choice(answer: Answer, index: int, start: int) -> Json:
    """The tokens from ``start`` on; the version spans come with the last and cover all tokens."""
    sequence = answer.sequences[index]
    end = sequence.output_length
    return {
        "index": index,
        "finish_reason": sequence.finish_reason,
        "stop_reason": sequence.stop_reason,
        "token_ids": _output(sequence, start, end),
        "routed_experts": answer.experts(sequence),
        "sampling_mask": None,
        "weight_versions": _spans(sequence),
        "logprobs": _tokens_logprobs(answer.request, sequence, start, end),
    }


def _spans(sequence: Sequence) -> list[Json] | None:
    return as_objects(sequence.spans) if sequence.finished else None


def _tokens_logprobs(
    request: GenerateRequest, sequence: Sequence, start: int, end: int
) -> Json | None:
    if request.params.logprobs is None:
        return None
    if not any(sequence.top_logprobs[start:end]):
        ids = _output(sequence, start, end)
        logprobs, ranks = sequence.logprobs[start:end], sequence.ranks[start:end]
        return {"content": msgspec.Raw(write_records(ids, logprobs, ranks, json_bytes))}
    return {"content": [_tokens_logprob(sequence, at) for at in range(start, end)]}


def _tokens_logprob(sequence: Sequence, at: int) -> Json:
    chosen = {
        "token_id": sequence.token_ids[sequence.prompt_length + at],
        "logprob": sequence.logprobs[at],
        "rank": sequence.ranks[at],
    }
    others = [
        candidate._asdict()
        for candidate in sequence.top_logprobs[at]
        if candidate.token_id != chosen["token_id"]
    ]
    return {**chosen, "top_logprobs": [chosen, *others]}
