"""Several parts of an adapter are judged in one model, as each would be in a model of its own."""

from __future__ import annotations

import gc
import json
import weakref

import pytest

mx = pytest.importorskip("mlx.core")

from command_line import run, usual  # noqa: E402
from evaluated import KEYS, K, own_cache, place  # noqa: E402, F401
from helpers import random_adapters  # noqa: E402

from fpo_mlx.judge import evaluate as evaluation  # noqa: E402
from fpo_mlx.model import adapters, load, open  # noqa: E402, A004
from fpo_mlx.model.trees import arrays_of  # noqa: E402

SCALES = ("0.25", "0", "1")


@pytest.fixture(scope="module", params=["lora", "dora"])
def both(place, tmp_path_factory, request):  # noqa: F811
    """Two adapters of a kind."""
    folders = [tmp_path_factory.mktemp(f"{request.param}-{i}") for i in range(2)]
    for seed, folder in enumerate(folders):
        model = load.load_model(place / "model").model
        n, paths = adapters.adapted_paths(model, 2, 1, KEYS)
        spec = adapters.AdapterSpec(request.param, n, 3, 2.0, 0.0, paths)
        adapters.attach(model, spec)
        values = random_adapters(model, 0.2, seed)
        adapters.save(folder / adapters.WEIGHTS, {k: mx.array(v) for k, v in values.items()})
        (folder / adapters.CONFIG).write_text(json.dumps(spec.as_config("m")))
    return folders


def judged(place, out, paths, scales):  # noqa: F811
    words = [word for path in paths for word in ("--adapter-path", path)]
    words += ["--adapter-scales", ",".join(scales)] if len(scales) > 1 else []
    words += ["--adapter-scale", scales[0]] if len(scales) == 1 else []
    flags = ["--split", "valid", "--top-k", K, "--samples", 2, "--max-tokens", 5, "--overwrite"]
    done = run("evaluate", *usual(place), *flags, *words, "--json", out)
    assert done.exit_code == 0, done.stderr
    return json.loads(out.read_text())


def test_parts_are_judged_to_the_bit_as_each_alone(both, place, tmp_path):  # noqa: F811
    """After other parts and another adapter, too; the base as well."""
    together = judged(place, tmp_path / "t.json", both, SCALES)
    alone = [
        judged(place, tmp_path / "a.json", [path], [scale]) for path in both for scale in SCALES
    ]
    shared = ("kind", "version", "split", "objective", "base")
    for got, wanted in zip(together["adapters"], alone, strict=True):
        assert got == {k: v for k, v in wanted.items() if k not in shared}
    assert together["base"] == alone[0]["base"]
    changes = [abs(one["summary"]["logps_per_token/chosen_change"]) for one in alone[:3]]
    assert changes[1] < 1e-6 < changes[0] < changes[2]


def test_the_model_is_read_once_for_each_adapter_and_let_go_with_it(
    both,
    place,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    plain, read = load.load_model, []

    def load_model(spec, **how):
        assert not [module for module in (ref() for ref in sum(read, [])) if module is not None]
        loaded = plain(spec, **how)
        modules = [m for _, m in loaded.model.named_modules() if arrays_of(m.parameters())]
        read.append([weakref.ref(module) for module in modules])
        return loaded

    monkeypatch.setattr(open, "load_model", load_model)
    judged(place, tmp_path / "e.json", both, SCALES)
    assert len(read) == 2


def test_memory_does_not_grow_by_the_part(both, place, tmp_path, monkeypatch):  # noqa: F811
    plain, held = evaluation.evaluate, []

    def evaluate(scorer, data, *more):
        report = plain(scorer, data, *more)
        gc.collect()
        held.append(mx.get_active_memory())
        return report

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    parts = [str(1 - n / 16) for n in range(8)]
    judged(place, tmp_path / "e.json", both[:1], parts)
    assert len(held) == 8
    assert max(held[1:]) <= held[1] + 256  # a number or two, and no array of the adapter
