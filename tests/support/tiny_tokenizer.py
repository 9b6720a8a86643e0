"""A real tokenizer in miniature: byte-level BPE with about 300 tokens and a ChatML template.

Byte-level, so every text can be encoded and decoded; built in milliseconds, without network.
Use it as `from tiny_tokenizer import build_tiny_tokenizer` (pytest puts tests/ on the path).
"""

from __future__ import annotations

import functools
from pathlib import Path

LINES = (
    "What is the capital of France? The capital of France is Paris.",
    "Explain the answer to the question in one short sentence.",
    "You are a helpful assistant. The user asks and the assistant answers.",
    "Write a poem about the sea and the rain and the stars.",
)
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 300


@functools.cache
def _tokenizer_json(vocabulary: int, lines: tuple[str, ...]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer.to_str()


def build_tiny_tokenizer(
    folder: Path,
    template: str | None = CHATML,
    vocabulary: int = VOCABULARY,
    lines: tuple[str, ...] = LINES,
) -> Path:
    """Save the tokenizer into folder (made if absent) as transformers and mlx-lm read it.

    Ids: 0 <|endoftext|> (also padding), 1 <|im_start|>, 2 <|im_end|> (end of sequence), 3 to 258
    the bytes, then merges. `template=None` saves it without a chat template. Returns folder.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(vocabulary, lines)),
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        fast.chat_template = template
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))
    return folder
