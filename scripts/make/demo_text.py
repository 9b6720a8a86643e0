"""Text for the demo's SAE: SmolLM2 answers the demo's prompts and generic ones, at temperature 0.9.

    python scripts/make/demo_text.py --output chats.jsonl [--model FOLDER] [--minutes 14]

Needs the extra `torch`. Each line of the output is {"messages": [user, assistant]}.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fpo_mlx.demo import smollm2

PAIRS = Path(__file__).resolve().parents[2] / "fpo_mlx" / "demo" / "data" / "train.jsonl"

TOPICS = """\
photosynthesis; the water cycle; gravity; how vaccines work; the French Revolution; compost; a
budget for a student; learning the guitar; making bread; growing tomatoes; black holes;
volcanoes; writing a cover letter; public speaking; a healthy breakfast; sleeping better; the
immune system; electric cars; solar panels; the Roman Empire; the invention of printing; jazz;
watercolour painting; chess openings; training a puppy; looking after a cat; birds in winter;
coral reefs; rain forests; the moon's phases; prime numbers; fractions; probability; sorting a
list in Python; recursion; a to-do app; web security; strong passwords; choosing a laptop;
cleaning a kitchen; packing for a trip; a weekend in Lisbon; hiking safely; camping with
children; learning Spanish; remembering names; a job interview; asking for a raise; working from
home; making friends in a new city; a birthday party; a short poem; a detective story; a dragon
who is afraid of fire; a letter from the sea; kindness; inflation; supply and demand; saving for
retirement; voting; the United Nations; renewable energy; running a first 5 km; yoga; stretching;
drinking enough water; vegetarian dinners; pasta; green tea; bicycles; trains; bridges;
lighthouses; maps; clocks; bees; whales; dinosaurs; glaciers; deserts; DNA; atoms; magnets;
sound; rainbows; the internet; search engines; machine learning; robots"""

ASKS = (
    "Explain {} to a ten-year-old.",
    "Tell me about {}.",
    "What are three important facts about {}?",
    "Give me a short introduction to {}.",
    "Write a short paragraph about {}.",
    "What should a beginner know about {}?",
    "Can you give me a few tips on {}?",
    "Why does {} matter?",
    "Write a list of questions one could ask about {}.",
    "I have to give a talk on {}. How do I start?",
    "What do people often get wrong about {}?",
    "hi, can u help me with {} pls",
    "Summarize {} in two sentences.",
    "Write a friendly email to a colleague about {}.",
)


def seed_prompts(rng: random.Random) -> list[str]:
    """Every question about every topic, shuffled."""
    topics = [topic.strip() for topic in TOPICS.replace("\n", " ").split(";")]
    prompts = [ask.format(topic) for ask, topic in itertools.product(ASKS, topics)]
    rng.shuffle(prompts)
    return prompts


def demo_prompts(path: Path) -> list[str]:
    """The user's words of the demo's pairs; none if they are not written yet."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]


def interleave(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """a1 b1 a2 b2 …, then what is left of the longer one."""
    both = itertools.zip_longest(first, second)
    return [prompt for pair in both for prompt in pair if prompt is not None]


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, temperature: float
) -> list[tuple[str, int]]:
    """One sampled (answer, its tokens) a prompt; an answer that was cut has no closing token."""
    import torch

    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        out = model.generate(
            **batch, max_new_tokens=max_tokens, do_sample=True, temperature=temperature, top_k=0
        )
    new = out[:, batch["input_ids"].shape[1] :]
    counts = (new != tokenizer.pad_token_id).sum(dim=1).tolist()
    return list(zip(tokenizer.batch_decode(new, skip_special_tokens=True), counts, strict=True))


def chats(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], int]]:
    """(row, tokens of the answer) until the prompts or the minutes run out."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # batches this small gain nothing from a second one
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    prompts = interleave(demo_prompts(args.pairs), seed_prompts(random.Random(args.seed)))
    started = time.monotonic()
    for at in range(0, len(prompts), args.batch_size):
        if time.monotonic() - started > 60 * args.minutes:
            return
        batch = prompts[at : at + args.batch_size]
        found = answers(model, tokenizer, batch, args.max_tokens, args.temperature)
        for prompt, (answer, count) in zip(batch, found, strict=True):
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer.strip()},
            ]
            yield {"messages": messages}, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=smollm2.model_folders().full)
    parser.add_argument("--pairs", type=Path, default=PAIRS)
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--tokens", type=int, default=150_000, help="tokens of answers, at most")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens of one answer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    total = 0
    with args.output.open("w", encoding="utf-8") as file:
        for rows, (row, count) in enumerate(chats(args), start=1):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            total += count
            if rows % args.batch_size == 0:
                file.flush()
                print(f"{rows} chats, {total} tokens of answers", file=sys.stderr)
            if total >= args.tokens:
                break


if __name__ == "__main__":
    main()
