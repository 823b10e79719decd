"""Write the tiny models that the real servers serve; run with the environment's interpreter.

    python build_models.py FOLDER

makes ``FOLDER/tiny-1`` … ``FOLDER/tiny-3``: one architecture (Qwen2, 2 layers, hidden size 64) and
one byte-level tokenizer, with weights drawn from three seeds. Half a megabyte each.

The weights are drawn wider than those of a model in training (0.3, not 0.02), so that the greedy
continuations of two seeds part at once: that is how a test sees that a server changed its weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

SEEDS = (1, 2, 3)
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY_SIZE = 371  # 3 special tokens, 256 bytes, 112 merges
SENTENCES = (
    "A rollout asks a server for tokens and keeps the probability of each of them.",
    "The trainer waits for a whole batch, then it sends the new weights to every server.",
    "How many pears are left when three of nine are eaten? Six pears are left.",
    "The quick brown fox jumps over the lazy dog while the server counts its tokens.",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on a few sentences: every byte is a token, so any text encodes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=CHAT_TEMPLATE,
    )


def model(seed: int, words: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """Draw the weights of one tiny model."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        initializer_range=0.3,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def main(folder: Path) -> None:
    logging.disable_progress_bar()
    words = tokenizer()
    if len(words) != VOCABULARY_SIZE:
        raise SystemExit(f"the tokenizer learned {len(words)} tokens, not {VOCABULARY_SIZE}")
    for seed in SEEDS:
        target = folder / f"tiny-{seed}"
        model(seed, words).save_pretrained(target)
        words.save_pretrained(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
