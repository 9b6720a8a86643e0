"""The public Python API: lazy, small, and telling the truth; the examples of its page run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from command_line import BLOCK, ROWS, lines, random_sae

import fpo_mlx
from fpo_mlx.sae.convert import write_saelens

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "python.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """my-model, my-sae, pairs/: what the page's examples start from."""
    root = tmp_path_factory.mktemp("api")
    tiny_models.tiny_llama(root / "my-model", tokenizer=True)
    write_saelens(random_sae(tiny_models.HIDDEN), root / "my-sae")
    lines(root / "pairs" / "train.jsonl", *ROWS)
    lines(root / "pairs" / "valid.jsonl", {**ROWS[0], "prompt": "Held out?"})
    return root


@pytest.fixture
def there(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "cache"))
    return place


def test_the_names_are_few_documented_and_no_rooms():
    names = [name for name in fpo_mlx.__all__ if name != "__version__"]
    assert len(names) <= 12
    rooms = {path.stem for path in Path(fpo_mlx.__file__).parent.iterdir()}
    assert not rooms & set(names), "`from fpo_mlx import x` must not depend on what was imported"
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == sorted(names, key=text.index)
    for name in names:
        assert re.search(rf"\b{name}\b", "".join(BLOCKS)), f"{name} has no example"
        assert getattr(fpo_mlx, name).__doc__, f"{name} has no docstring"
    assert set(fpo_mlx.__all__) <= set(dir(fpo_mlx))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'open_modle'"):
        fpo_mlx.open_modle  # noqa: B018


def test_a_public_name_sets_the_machine_up_before_mlx_is_there():
    probe = (
        "import sys, fpo_mlx\n"
        "assert not {'numpy', 'click', 'mlx', 'torch'} & set(sys.modules)\n"
        "from fpo_mlx.machine import blas\n"
        "assert blas._status is None\n"
        "from fpo_mlx import open_model\n"
        "assert blas._status is not None\n"
        "assert not {'mlx', 'mlx.core', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_examples_of_the_page_run(there, capsys):
    pytest.importorskip("mlx.core")
    found: dict = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/python.md, example {number}", "exec"), found)
    assert (there / "my-adapters" / "adapters.safetensors").is_file()
    assert len(found["cache"]) == 2 * (len(ROWS) + 1)
    assert found["features"].shape == (len(found["hidden"]), 48)
    assert "Traceback" not in capsys.readouterr().out


def test_activations_are_transformers_hidden_states_at_the_predicting_positions(there):
    pytest.importorskip("mlx.core")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fpo_mlx import Site, open_model

    (rows,) = open_model("my-model", [Site(BLOCK)]).activations("Why?", "To calm itself.")
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    turns = [{"role": "user", "content": "Why?"}]
    ids = [
        tokenizer.apply_chat_template(t, add_generation_prompt=g, return_dict=False)
        for t, g in (
            (turns, True),
            ([*turns, {"role": "assistant", "content": "To calm itself."}], False),
        )
    ]
    start, whole = len(ids[0]), torch.tensor([ids[1]])
    oracle = AutoModelForCausalLM.from_pretrained("my-model")
    with torch.no_grad():
        hidden = oracle(whole, output_hidden_states=True).hidden_states[BLOCK + 1][0]
    wanted = hidden[start - 1 : -1].numpy()
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-4)


def test_scores_are_the_cached_ones_and_features_the_mean_of_the_encoded_rows(there):
    """Three ways to the same numbers: score_pairs, a cache that precompute filled, and encode."""
    pytest.importorskip("mlx.core")
    from fpo_mlx import (
        encode,
        open_model,
        pipeline,
        read_cache,
        read_sae,
        read_settings,
        score_pairs,
    )

    settings = read_settings(model="my-model", sae="my-sae", data="pairs", top_k=5)
    pipeline.precompute(settings, output=Path("known"), say=lambda _: None)
    sae = read_sae("my-sae")
    model, cache = open_model("my-model", [sae]), read_cache("known")
    for row, pair in zip(ROWS, score_pairs(model, ROWS), strict=True):
        for side, key, score in zip(
            ("chosen", "rejected"), model.pair_of(row).keys, pair, strict=True
        ):
            assert cache.get(key).logps == pytest.approx(score.logps, rel=1e-6)
            assert cache.get(key).tokens == score.tokens
            (rows,) = model.activations(row["prompt"], row[side])
            assert len(rows) == score.tokens
            dense = score.features[0].to_dense(sae.n_features)
            np.testing.assert_allclose(dense, encode(sae, rows).mean(axis=0), rtol=1e-4, atol=1e-5)


def test_a_model_may_be_opened_with_the_template_and_the_length_of_a_run(there, tmp_path):
    """So that its keys are those of the run's cache: of other texts, and of answers cut short."""
    pytest.importorskip("mlx.core")
    from fpo_mlx import FpoError, Site, open_model, pipeline, read_cache, read_settings

    template = tmp_path / "own.jinja"
    template.write_text("{{ lead }}{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}")
    how = {"chat_template": str(template), "chat_template_args": {"lead": "Go: "}}
    plain = open_model("my-model", [Site(BLOCK)])
    long = max(len(r) for row in ROWS for r in plain.pair_of(row).responses)
    whole = open_model("my-model", [Site(BLOCK)], **how)
    limit = len(whole.pair_of(ROWS[0]).prompt) + long // 2
    settings = read_settings(
        model="my-model", sae="my-sae", data="pairs", top_k=5, max_seq_length=limit, **how
    )
    pipeline.precompute(settings, output=Path("other"), say=lambda _: None)
    cache = read_cache("other")
    model = open_model("my-model", [Site(BLOCK)], **how, max_seq_length=limit)
    assert all(key in cache for row in ROWS for key in model.pair_of(row).keys)
    assert not any(key in cache for row in ROWS for key in whole.pair_of(row).keys)
    (rows,) = model.activations(ROWS[0]["prompt"], "x" * 100)
    assert len(rows) == limit - len(whole.pair_of(ROWS[0]).prompt)
    with pytest.raises(FpoError, match="every prompt alone fills"):
        model.pair_of({**ROWS[0], "prompt": "Why? " * limit})


def test_an_answer_that_does_not_follow_the_rendered_prompt_is_refused_as_that_of_a_pair(
    there, tmp_path
):
    """Its first tokens would be cut off, or the prompt's last ones taken for its own."""
    pytest.importorskip("mlx.core")
    from fpo_mlx import FpoError, Site, open_model

    folder = shutil.copytree("my-model", tmp_path / "thinks")
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    header = "{% if add_generation_prompt %}the sea{% endif %}"
    (folder / "chat_template.jinja").write_text(template + header)
    model = open_model(folder, [Site(1)])
    with pytest.raises(FpoError, match="is not how the rendered prompt"):
        model.activations("Why?", "So.")


def test_an_adapter_changes_what_is_seen(there, tmp_path):
    pytest.importorskip("mlx.core")
    from fpo_mlx import Site, open_model, read_settings, train_adapters

    out = tmp_path / "a"
    settings = read_settings(
        model="my-model", data="pairs", constraint="none", iters=2, batch_size=1,
        learning_rate=1e-2, adapter_path=str(out),
    )  # fmt: skip
    assert not out.exists()
    reports = train_adapters(settings)
    assert not out.exists(), "nothing happens before the reports are asked for"
    kinds = {type(report).__name__ for report in reports}
    assert "SavedReport" in kinds
    seen = [
        open_model("my-model", [Site(3)], adapter_path=adapter).activations("Why?", "So.")[0]
        for adapter in (None, out)
    ]
    assert np.abs(seen[0] - seen[1]).max() > 1e-4


def test_an_sae_is_read_where_the_call_puts_it(there):
    from fpo_mlx import Site, read_sae

    assert read_sae("my-sae").site == Site(BLOCK)
    assert read_sae("my-sae", layer=3).site == Site(3)
    assert read_sae("my-sae", site="mlp_out").site == Site(BLOCK, "mlp_out")


def test_what_does_not_fit_is_said(there):
    pytest.importorskip("mlx.core")
    from fpo_mlx import FpoError, Site, open_model, read_cache, read_sae, read_settings, score_pairs

    with pytest.raises(FpoError, match="blocks are 0 to 3"):
        open_model("my-model", [Site(4)])
    with pytest.raises(FpoError, match="1 SAEs and 1 places"):
        open_model("my-model", [read_sae("my-sae"), Site(1)])
    with pytest.raises(FpoError, match="row 1: "):
        score_pairs(open_model("my-model"), [ROWS[0], {"prompt": "a", "chosen": "b"}])
    with pytest.raises(FpoError, match="no reference cache"):
        read_cache("pairs")
    with pytest.raises(FpoError, match="iterz"):
        read_settings(iterz=3)
    with pytest.raises(FpoError, match="Did you mean sae_k"):
        read_sae("my-sae", sae_kk=3)


def test_settings_are_those_of_a_yaml_file_under_the_values(tmp_path):
    from fpo_mlx import read_settings

    path = tmp_path / "run.yaml"
    path.write_text("model: m\niters: 5\n")
    settings = read_settings(path, iters=7)
    assert (settings.reference.model, settings.train.iters) == ("m", 7)
    assert json.dumps(settings.as_dict())
