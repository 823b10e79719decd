"""The facts of a real vLLM server that the rest of the library is built on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from .server import VllmServer

pytestmark = pytest.mark.real_servers

PROMPT = [300, 301, 302, 303, 304]


def test_both_servers_continue_a_prompt_alike(vllm_servers: Sequence[VllmServer]) -> None:
    (ids, logprobs), (other_ids, other_logprobs) = (s.greedy(PROMPT, 64) for s in vllm_servers)
    assert ids == other_ids
    assert logprobs == pytest.approx(other_logprobs, abs=1e-4)
