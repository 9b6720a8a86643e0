"""What a report says in rows and columns: plain text cells, escaped by the template."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fpo_mlx.config import PRESETS, default_of, options
from fpo_mlx.records import COLLAPSE
from fpo_mlx.report.plots import value_of
from fpo_mlx.report.read import Run, figure, on_training, part, scale_of, standing

NONE = "–"
ROWS_OF_CURVES = 12  # of the table beside the plots

# Names that a reader understands; keys of `evaluate` that are not here appear under their own.
METRICS = {
    "n": "Pairs",
    "prompts": "Prompts of these pairs",
    "rewards/accuracies": "Reward accuracy",
    "policy_accuracy": "Policy accuracy",
    "rewards/margins": "Reward margin",
    "logps_per_token/chosen_change": "Chosen log-prob, change (nats a token)",
    "logps_per_token/rejected_change": "Rejected log-prob, change (nats a token)",
    "features/chosen": "Feature distance D, chosen",
    "features/rejected": "Feature distance D, rejected",
    "features/margin": "Feature distance D, margin",
    "drift/chosen": "Drift squared, chosen (relative D)",
    "drift/rejected": "Drift squared, rejected (relative D)",
    "kl/chosen": "KL, chosen (nats)",
    "kl/rejected": "KL, rejected (nats)",
    "kl/margin": "KL, margin (nats)",
    "perplexity/chosen": "Perplexity of chosen",
    "answers/entropy": "Entropy of sampled answers (nats a token)",
    "answers/distinct_1": "Distinct tokens of sampled answers, distinct-1",
    "answers/distinct_2": "The same for pairs of tokens, distinct-2",
    "answers/distinct_3": "The same for triples, distinct-3",
    "answers/tokens": "Length of sampled answers (tokens)",
    "answers/finished": "Sampled answers that came to an end",
    "answers/n": "Sampled answers",
    "share_chosen_longer": "Pairs whose chosen is longer",
    "rewards/accuracies/chosen_longer": "Reward accuracy where chosen is longer",
    "rewards/accuracies/chosen_not_longer": "Reward accuracy elsewhere",
    **{
        f"{key}/{size}": f"{name}, {size} chosen"
        for key, name in (("rewards/accuracies", "Reward accuracy"), ("n", "Pairs"))
        for size in ("short", "middle", "long")
    },
    "loss": "Loss",
    "u": "u, what the loss is of",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "logps/chosen": "Chosen log-prob (nats an answer)",
    "logps/rejected": "Rejected log-prob (nats an answer)",
    "logps_per_token/chosen": "Chosen log-prob (nats a token)",
    "logps_per_token/rejected": "Rejected log-prob (nats a token)",
}
PRIMARY_METRICS = list(METRICS)[
    : list(METRICS).index("rewards/accuracies/short")
]  # the rest is folded away
TEXT_CELL = re.compile(r"(?!to\b|not a number|infinite)[^\W\d_]{2}")
HEADLINES = (
    ("rewards/accuracies", "Reward accuracy"),
    ("logps_per_token/chosen_change", "Chosen log-prob, nats a token"),
    ("rewards/margins", "Reward margin"),
    ("kl/margin", "KL margin, nats"),
    ("features/chosen", "D chosen"),
    ("features/rejected", "D rejected"),
)


@dataclass(frozen=True)
class Table:
    """The first cell of a row is its head. links: addresses of cells by (row, column)."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: bool = True
    note: str = ""
    links: Mapping[tuple[int, int], str] = field(default_factory=dict)

    @property
    def left(self) -> frozenset[int]:
        """Columns of words, which begin at the left: all but those of figures."""
        columns = range(len(self.head))
        if not self.numeric:
            return frozenset(columns)
        return frozenset(
            i for i in columns if i == 0 or any(TEXT_CELL.search(row[i]) for row in self.rows)
        )


@dataclass(frozen=True)
class Card:
    """A run in a few figures."""

    name: str
    colour: int
    what: str  # its objective
    figures: Sequence[tuple[str, str, str]]  # label, value, interval
    source: str  # where the figures come from
    collapsed: bool = False


def text(value: Any) -> str:
    """Any value of a file as short text."""
    if value is None or value == "" or value == []:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {text(v)}" for k, v in value.items()) or NONE
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(text(v) for v in value)
    return str(value)


def number(value: float | None, digits: int = 4) -> str:
    """So many digits that count, without exponents where they can be avoided."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value)).replace("-", "−")
    return f"{value:.{digits}g}".replace("-", "−")


def interval(summary: Mapping[str, Any], key: str, digits: int = 4) -> str:
    """ "0.89 to 0.98", or nothing."""
    found = summary.get(f"{key}/ci95")
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != 2:
        return ""
    low, high = map(figure, found)
    return "" if low is None or high is None else f"{number(low, digits)} to {number(high, digits)}"


def summary_of(run: Run) -> Mapping[str, Any]:
    """The adapter's own row of an evaluation; empty without one."""
    found = run.results.get("evaluate")
    return part(found.value, "summary") if found else {}


def judged(run: Run) -> Mapping[str, Any]:
    """What an evaluation says beside its figures: the split, the part; empty without one."""
    found = run.results.get("evaluate")
    return found.value if found else {}


def judged_less(run: Run) -> bool:
    """Whether its evaluation is one of training pairs, or of a part of the adapter."""
    found = run.results.get("evaluate")
    return found is not None and not all(standing(found))


def judged_on(run: Run) -> str:
    """ "held-out pairs (valid)"; an older file does not say of which split it is."""
    split = judged(run).get("split")
    if on_training(judged(run)):
        return "training pairs"
    return f"held-out pairs ({split})" if isinstance(split, str) else "held-out pairs"


def part_judged(run: Run) -> str:
    """ " × 0.25" where an evaluation is of that part of the adapter's change; nothing of all."""
    scale = scale_of(judged(run))
    return "" if scale == 1.0 else f" × {number(scale)}"


def card(run: Run, colour: int) -> Card:
    """The figures that matter, from held-out pairs where there are some."""
    summary, held_out = summary_of(run), run.end or run.valid
    if summary and not (judged_less(run) and held_out):
        n, scale = figure(summary.get("n")), part_judged(run)
        source = f"{f'{number(n)} ' if n else ''}{judged_on(run)}, by fpo-mlx evaluate"
        source += f", of the adapter{scale}" if scale else ""
    elif held_out:
        last = run.end or run.valid[-1]
        summary, source = part(last, "metrics"), (
            f"validation pairs: {text(last.get('pairs'))}, iteration {text(last.get('iteration'))}"
        )  # fmt: skip
    elif run.train:
        last = run.train[-1]
        summary = part(last, "metrics")
        source = f"training pairs before iteration {text(last.get('iteration'))}; none held out"
    else:
        source = "no figures yet"
    shown = [
        (label, number(figure(summary[key]), 3), interval(summary, key, 3))
        for key, label in HEADLINES
        if figure(summary.get(key)) is not None
    ]
    return Card(run.name, colour, objective(run), shown, source, chosen_drop(run) > COLLAPSE)


def chosen_drop(run: Run) -> float:
    """Nats a token that the chosen answers lost against the reference; 0 where it is not known."""
    key = "logps_per_token/chosen_change"
    found = run.results.get("evaluate")
    now = found is not None and not found.stale and not part_judged(run)  # of these adapters, whole
    change = figure(summary_of(run).get(key)) if now else None
    if change is None:
        change = value_of(last_seen(run), key)
    return 0.0 if change is None else -change


def last_seen(run: Run) -> Mapping[str, Any]:
    """What a run measured last of what it saved: of validation pairs, unless it went on since."""
    last = (run.end,) if run.end else (*run.valid[-1:], *run.train[-1:])
    return max(last, key=lambda one: value_of(one, "iteration") or 0.0, default={})


def objective(run: Run) -> str:
    """ "fpo: β 0.1, α 0.5, features": the point of the family in one line."""
    s = run.settings
    if not s:
        return "objective unknown: no run.json"
    parts = [f"β {text(s.get('beta'))}"]
    if s.get("margin") == "constant":
        parts.append(f"γ {text(s.get('gamma'))}")
    if s.get("constraint") == "none":
        parts.append("no constraint")
    else:
        parts.append(f"{_held(s)} on {text(s.get('constraint'))}")
        parts += [] if s.get("stop_gradient") else ["no stop-gradient"]
    return f"{text(s.get('objective'))}: " + ", ".join(parts)


def _held(settings: Mapping[str, Any]) -> str:
    """How far: by alpha, or by the target that alpha was found for."""
    for name, of in (("target_drift", "drift"), ("target_kl", "KL")):
        if settings.get(name) is not None:
            return f"α for a {of} of {text(settings[name])}"
    return f"α {text(settings.get('alpha'))}"


def evaluation(runs: Sequence[Run]) -> tuple[Table | None, Table | None]:
    """(what matters, everything else): metrics down, runs across, the base where there is one.

    A best/ that has figures of its own stands beside its run.
    """
    runs = [one for run in runs for one in (run, *run.best)]
    training = {on_training(judged(run)) for run in runs if summary_of(run)}
    told = len(training) > 1

    def column(name: str, run: Run) -> str:
        return f"{name}, training pairs" if told and on_training(judged(run)) else name

    columns = [(column(run.name + part_judged(run), run), summary_of(run)) for run in runs]
    for run in sorted(runs, key=lambda run: on_training(judged(run))):
        base = part(judged(run), "base")
        if base:
            own = part(base, "summary") or base  # its rewards are 0 by definition: they say nothing
            own = {k: v for k, v in own.items() if not k.startswith("rewards/")}
            columns.insert(0, (column("base model", run), own))
            break
    columns = [(name, s) for name, s in columns if s]
    if not columns:
        return None, None
    keys = [k for k in METRICS if any(k in s for _, s in columns)]
    others = {k for _, s in columns for k, v in s.items() if figure(v) is not None}
    keys += sorted(k for k in others - set(METRICS) if "/ci95" not in k)
    rows = {k: [METRICS.get(k, k), *(_measured(s, k) for _, s in columns)] for k in keys}
    around = any("/ci95" in key for _, summary in columns for key in summary)
    note = "Below a figure: its 95 % interval." if around else ""
    head = ["Metric", *(name for name, _ in columns)]
    first = [row for key, row in rows.items() if key in PRIMARY_METRICS]
    rest = [row for key, row in rows.items() if key not in PRIMARY_METRICS]
    what = "Training pairs" if training == {True} else "Held-out pairs"
    return (
        Table(what, head, first, note=note) if first else None,
        Table(f"{what}, all other figures", head, rest) if rest else None,
    )


def _measured(summary: Mapping[str, Any], key: str) -> str:
    value = number(figure(summary.get(key)))
    around = interval(summary, key)
    return f"{value}\n{around}" if around else value


def curves(run: Run) -> Table | None:
    """The plots' figures, a dozen iterations of them."""
    if not run.train:
        return None
    keys = {
        "loss": "Loss", "rewards/accuracies": "Accuracy", "rewards/margins": "Margin",
        "logps_per_token/chosen_change": "Chosen log-prob", "features/chosen": "D chosen",
        "features/rejected": "D rejected", "kl/chosen": "KL chosen", "kl/rejected": "KL rejected",
        "tokens_per_second": "Tokens/s", "peak_memory_gb": "Memory, GB",
    }  # fmt: skip
    last = len(run.train) - 1
    n = min(ROWS_OF_CURVES, len(run.train))
    picks = sorted({round(i * last / max(1, n - 1)) for i in range(n)})
    kept = [k for k in keys if any(value_of(run.train[i], k) is not None for i in picks)]
    rows = [
        [text(run.train[i].get("iteration")), *(number(value_of(run.train[i], k)) for k in kept)]
        for i in picks
    ]
    return Table(f"Training of {run.name}", ["Iteration", *(keys[k] for k in kept)], rows)


def settings(runs: Sequence[Run]) -> tuple[Table | None, Table | None]:
    """(what differs from the defaults or between the runs, everything else)."""
    known = [name for run in runs for name in run.settings]
    names = list(dict.fromkeys(known))
    if not names:
        return None, None
    usual = [defaults(run) for run in runs]
    own, rest = [], []
    for name in names:
        cells = [text(run.settings.get(name)) for run in runs]
        plain = [text(d.get(name)) for d in usual]
        (rest if cells == plain and len(set(cells)) == 1 else own).append([name, *cells])
    head = ["Setting", *(run.name for run in runs)]
    given = Table("Settings that were chosen, or that differ", head, own, numeric=False)
    left = Table("Settings at their defaults", head, rest, numeric=False)
    return given, left if rest else None


def defaults(run: Run) -> Mapping[str, Any]:
    """What every setting is where nobody says anything else, under the run's preset."""
    preset = PRESETS.get(str(run.settings.get("objective")), {})
    plain = {name: default_of(field) for name, field in options().items()}
    return {**plain, "objective": "fpo", **preset}


def fingerprints(runs: Sequence[Run]) -> Table | None:
    """What the runs were made of; the first 16 of 64 digits, all of them in run.json."""
    names = list(dict.fromkeys(k for run in runs for k in run.fingerprints))
    versions = list(dict.fromkeys(k for run in runs for k in part(run.record, "versions")))
    rows = [[name, *(_digits(run.fingerprints.get(name)) for run in runs)] for name in names]
    rows += [[n, *(text(part(run.record, "versions").get(n)) for run in runs)] for n in versions]
    if any(run.adapter for run in runs):
        rows.append(["adapted", *(adapted(run.adapter) for run in runs)])
    head = ["Part", *(run.name for run in runs)]
    return Table("Fingerprints, versions and adapters", head, rows, numeric=False) if rows else None


def _digits(value: Any) -> str:
    """The beginning of a hash; of [[hash, site], …] each with its site."""
    if isinstance(value, str):
        return value[:16]
    if not isinstance(value, Sequence):
        return text(value)
    return "; ".join(" ".join(text(word) for word in _short(one)) for one in value) or "none"


def _short(one: Any) -> list[Any]:
    parts = list(one) if isinstance(one, Sequence) and not isinstance(one, str) else [one]
    return [text(parts[0])[:16], *parts[1:]] if parts else []


def adapted(config: Mapping[str, Any]) -> str:
    """ "lora, rank 8, scale 20, blocks 12 to 27: mlp.down_proj, …"."""
    if not config:
        return NONE
    lora = part(config, "lora_parameters")
    words = [text(config.get("fine_tune_type")), f"rank {text(lora.get('rank'))}",
             f"scale {text(lora.get('scale'))}"]  # fmt: skip
    keys = lora.get("keys")
    found = [re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", str(k)) for k in keys or ()]
    matched = [m for m in found if m]
    if matched:
        blocks = sorted({int(m[1]) for m in matched})
        leaves = sorted({m[2] for m in matched})
        words.append(f"blocks {blocks[0]} to {blocks[-1]}: {', '.join(leaves)}")
    else:
        words.append(f"{text(config.get('num_layers'))} blocks")
    return ", ".join(words)


def memory(runs: Sequence[Run]) -> Table | None:
    """Predicted peak beside the measured one; nothing without either."""
    rows = []
    for run in runs:
        predicted, measured = predicted_gb(run), measured_gb(run)
        if predicted is None and measured is None:
            continue
        off = NONE if not (predicted and measured) else f"{100 * (predicted / measured - 1):+.0f} %"
        rows.append([run.name, number(predicted), number(measured), off.replace("-", "−")])
    head = ["Run", "Predicted, GB", "Measured, GB", "Prediction off by"]
    return Table("Peak memory of training", head, rows) if rows else None


def predicted_gb(run: Run) -> float | None:
    return figure(part(run.record, "memory").get("predicted_peak_gb")) or None


def measured_gb(run: Run) -> float | None:
    """As run.json has it, or the highest of the reports while the run has not ended."""
    found = figure(part(run.record, "memory").get("measured_peak_gb"))
    peaks = [p for r in run.train if (p := value_of(r, "peak_memory_gb")) is not None]
    return max(peaks) if found is None and peaks else found
