"""Prints, for every kind of bad input, the line that `fpo-mlx check` shows a user.

    python scripts/checks/findings.py

Each case is a file of its own beside a good row; the command runs as a user runs it. The tokenizer
is the tests' tiny one. Exits 1 when a kind has no line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

GOOD = {"prompt": "Q?", "chosen": "Yes.", "rejected": "Nope."}
ASK, TELL = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Yes."}
SWAPPED = {"prompt": "Q?", "chosen": "Nope.", "rejected": "Yes."}
LATER = "{% for m in messages %}{% if loop.last and m.role == 'user' %}? {% endif %}{{ m.content }}"
TEMPLATES = {  # templates that do what a good one does not
    "prompt not a prefix": LATER + "{% endfor %}",
    "no end of turn": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "template": "{{ raise_exception('no such conversation') }}",
    "template variables": "{{ think }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    "answer part dropped": "{% for m in messages %}{{ m.content[:3] }}<|im_end|>{% endfor %}",
    "prompt part dropped": "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>"
    "{% endfor %}",
    "added text": "{% for m in messages %}{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}",
}
# kind -> the rows of train.jsonl after the good one; a text is a line as it stands
CASES: dict[str, list[Any]] = {
    "unreadable": ['{"prompt": "Q?", "chosen": '],
    "missing field": [{"prompt": "Q?", "chosen": "Yes."}],
    "empty field": [{**GOOD, "chosen": " "}],
    "wrong type": [{**GOOD, "chosen": 3}],
    "out of range": [{**GOOD, "prompt": "R?", "agreement": 1.5}],
    "role order": [{**GOOD, "prompt": [ASK, ASK]}],
    "no preference": [
        {"prompt": "R?", "response_1": "No.", "response_2": "Yes.", "preference_strength": 0}
    ],
    "no shared prompt": [{"chosen": [ASK, TELL], "rejected": [{**ASK, "content": "R?"}, TELL]}],
    "two prompts": [{"question": "R?", "context": "A story.", "chosen": "Yes.", "rejected": "No."}],
    "same response": [{**GOOD, "rejected": "Yes."}],
    "broken text": [{**GOOD, "chosen": "half \ud83d of a pair"}],
    "template": [{**GOOD, "prompt": "R?"}],
    "template variables": [{**GOOD, "prompt": "R?", "chat_template_kwargs": {"think": False}}],
    "prompt not a prefix": [{**GOOD, "prompt": "R?"}],
    "answer part dropped": [],
    "beyond vocabulary": [],
    "scores disagree": [{**GOOD, "prompt": "R?", "score_chosen": 2, "score_rejected": 3}],
    "messages as text": [{**GOOD, "prompt": json.dumps([{**ASK, "content": "R?"}])}],
    "prompt part dropped": [{**GOOD, "prompt": "R?", "system": "Be brief."}],
    "prompt repeated": [{"prompt": "How many is two and two?",
                         "chosen": "How many is two and two? Four.",
                         "rejected": "How many is two and two? Five."}],
    "added text": [],
    "duplicate": [GOOD],
    "contradiction": [SWAPPED],
    "leakage": [],
    "dropped": [{**GOOD, "prompt": "long " * 99}],
    "same after cut": [{**GOOD, "chosen": "x" * 99 + "a", "rejected": "x" * 99 + "b"}],
    "cut": [{**GOOD, "prompt": "R?", "chosen": "x" * 99}],
    "no end of turn": [{**GOOD, "prompt": "R?"}],
    "control token": [{**GOOD, "chosen": "Yes.<|im_end|>"}],
    "odd unicode": [{**GOOD, "chosen": "Yes\u200b."}],
    "length bias": [{"prompt": f"{n}?", "chosen": "A longer answer.", "rejected": "No."}
                    for n in range(20)],
}  # fmt: skip


def write(folder: Path, kind: str) -> list[str]:
    """The data of one case; the words after `fpo-mlx check`."""
    rows = [GOOD, *CASES[kind]]
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    folder.mkdir()
    (folder / "train.jsonl").write_text(text)
    words = ["--data", str(folder), "--max-seq-length", "64"]
    if kind == "leakage":
        (folder / "valid.jsonl").write_text(json.dumps({**GOOD, "chosen": "Indeed."}) + "\n")
    if kind in TEMPLATES:
        (folder / "template.jinja").write_text(TEMPLATES[kind])
        words += ["--chat-template", str(folder / "template.jinja")]
    return words


def findings(root: Path) -> dict[str, str]:
    """kind -> the line that `fpo-mlx check` prints for it; empty if it prints none."""
    from click.testing import CliRunner
    from tiny_tokenizer import build_tiny_tokenizer

    from fpo_mlx.cli import main

    for name, more in (("model", {}), ("small", {"vocab_size": 20})):
        build_tiny_tokenizer(root / name)
        config = {"model_type": "llama", **more}
        (root / name / "config.json").write_text(json.dumps(config))
    lines = {}
    for kind in CASES:
        words = write(root / kind.replace(" ", "-"), kind)
        model = root / ("small" if kind == "beyond vocabulary" else "model")
        done = CliRunner().invoke(main, ["check", "--model", str(model), *words])
        wanted = f" {kind} "
        lines[kind] = next((li for li in done.stdout.splitlines() if wanted in li), "")
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="findings-") as folder:
        lines = findings(Path(folder))
    for line in lines.values():
        print(line)
    silent = [kind for kind, line in lines.items() if not line]
    if silent:
        print(f"no line for: {', '.join(silent)}", file=sys.stderr)
    sys.exit(bool(silent))


if __name__ == "__main__":
    main()
