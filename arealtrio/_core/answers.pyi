from collections.abc import Callable

# The tokens of an answer, one id, logprob and rank each, as a JSON array.
#
# ``text_of`` writes a logprob as JSON, in at most 32 bytes; it is not asked again for the very
# object that the token before had.
#
# ``write_records`` gives ``[{"token_id":1,"logprob":-0.5,"rank":1,"top_logprobs":[…]}]``, vLLM's
# content where each token is its only candidate: ``top_logprobs`` holds the same three fields.
# ``write_pairs`` gives ``[[-0.5,1,null]]``, SGLang's.
#
# Both raise ValueError if the lists differ in length or a text is too long, TypeError for an id or
# rank that is no integer or a text that is no bytes, and OverflowError for one beyond 64 bits.
def write_records(
    token_ids: list[int],
    logprobs: list[float],
    ranks: list[int],
    text_of: Callable[[float], bytes],
) -> bytes: ...
def write_pairs(
    logprobs: list[float], token_ids: list[int], text_of: Callable[[float], bytes]
) -> bytes: ...
