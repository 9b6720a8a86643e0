"""Data through the commands: what check knows train says, and what cannot work never starts."""

from __future__ import annotations

import importlib
import json
import re
import shutil

import numpy as np
import pytest
import tiny_models
from command_line import ROWS, lines, own_cache_and_signals, random_sae, run  # noqa: F401

pytest.importorskip("mlx.core")

from fpo_mlx.data import token_store  # noqa: E402
from fpo_mlx.sae.convert import write_saelens  # noqa: E402

DPO = ("--objective", "dpo")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, another, and pairs; written to by no test."""
    root = tmp_path_factory.mktemp("data")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    tiny_models.tiny_llama(root / "other", tokenizer=True, seed=1)
    tiny_models.tiny_gpt2(root / "gpt2", tokenizer=True)
    lines(root / "data" / "train.jsonl", *ROWS)
    return root


def with_template(place, tmp_path, change, model="model"):
    """A copy of a model with a changed chat template."""
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in (place / model).iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(change(template))
    return folder


def adapter(place, tmp_path):
    """An adapter of the other model."""
    done = run("train", "--model", place / "other", "--data", place / "data", *DPO, "--iters", 1,
               "--adapter-path", tmp_path / "theirs")  # fmt: skip
    assert done.exit_code == 0, done.output
    return tmp_path / "theirs"


def test_train_and_precompute_say_what_check_finds_before_the_long_part(place, tmp_path):
    model = with_template(place, tmp_path, lambda text: text.replace("<|im_end|>", ""))
    data = lines(tmp_path / "data" / "train.jsonl", *ROWS, ROWS[0])
    lines(tmp_path / "data" / "valid.jsonl", ROWS[1])
    usual = ("--model", model, "--data", data.parent, *DPO)
    trained = run("train", *usual, "--iters", 1, "--adapter-path", tmp_path / "out")
    scored = run("precompute", *usual, "--output", tmp_path / "ref")
    again = run("train", *usual, "--iters", 1, "--adapter-path", tmp_path / "again")
    for done in (trained, scored, again):
        assert done.exit_code == 0, done.output
        block = done.stderr.split("what `fpo-mlx check` finds")[1]
        for kind in ("no end of turn", "duplicate", "leakage"):
            assert kind in block, kind
        assert re.search(r"^  kept +duplicate ", block, re.MULTILINE)  # they are trained on
        assert "excluded" not in block
        assert f"{2 * (len(ROWS) + 1)}  train.jsonl:1: chosen does not end" in block
    assert trained.stderr.index("finds in these rows") < trained.stderr.index("scoring")


def test_of_a_model_of_the_hub_check_and_sae_info_fetch_no_weights(place, tmp_path, monkeypatch):
    """All of it was fetched, for its tokenizer or the width of its stream."""
    asked = []

    def download(repo, **settings):
        asked.extend(settings["allow_patterns"])
        folder = tmp_path / "of-the-hub"
        wanted = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(place / "model", folder, ignore=wanted, dirs_exist_ok=True)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    write_saelens(random_sae(tiny_models.HIDDEN), tmp_path / "sae")
    for words in (["check", "--data", place / "data"], ["sae", "info", tmp_path / "sae"]):
        done = run(*words, "--model", "owner/model")
        assert done.exit_code == 0, done.output
    assert asked.count("*.json") == 2
    assert "*.safetensors" not in asked


def test_the_check_of_a_large_set_is_read_until_anything_it_depends_on_changes(
    place, tmp_path, monkeypatch
):
    from fpo_mlx import data as of_data

    looked, real = [], of_data.check_data
    monkeypatch.setattr(of_data, "check_data", lambda *a, **k: looked.append(1) or real(*a, **k))
    rows = [{**ROWS[0], "prompt": f"Question {n}?"} for n in range(500)]
    data = lines(tmp_path / "data" / "train.jsonl", *rows, {"prompt": "no answers"})
    usual = ("check", "--data", data, "--model", place / "model", "--json", tmp_path / "1.json")
    first, again = run(*usual), run(*usual, "--overwrite")
    assert (first.exit_code, again.exit_code, len(looked)) == (3, 3, 1)
    assert again.stdout == first.stdout
    assert len(json.loads((tmp_path / "1.json").read_text())["findings"]) >= 1
    changes = [("--max-seq-length", 30), ("--model", place / "gpt2"), ("--fix", tmp_path / "good")]
    for times, change in enumerate(changes, 2):
        run(*usual, "--overwrite", *change)
        assert len(looked) == times, change
    lines(data, *rows)
    assert run(*usual, "--overwrite").exit_code == 0
    assert len(looked) == 5
    for kept in (tmp_path / "user-cache" / "checks").iterdir():
        kept.write_text(kept.read_text()[:-10])
    assert run(*usual, "--overwrite").exit_code == 0
    assert len(looked) == 6
    monkeypatch.setattr(token_store, "FORMAT", "of other rules")  # for which rows are taken
    assert run(*usual, "--overwrite").exit_code == 0
    assert len(looked) == 7


def test_ids_beyond_the_embedding_stop_every_command_before_it_runs(place, tmp_path):
    from safetensors.numpy import load_file, save_file

    model = with_template(place, tmp_path, lambda text: text)
    weights = load_file(model / "model.safetensors")
    short = {
        name: np.ascontiguousarray(array[:40]) if array.shape[0] == tiny_models.VOCAB else array
        for name, array in weights.items()
    }
    save_file(short, model / "model.safetensors", metadata={"format": "mlx"})
    usual = ("--model", model, "--data", place / "data")
    theirs = adapter(place, tmp_path)
    for words in (
        ("check", *usual),
        ("precompute", *usual, *DPO, "--output", tmp_path / "ref"),
        ("train", *usual, *DPO, "--iters", 1, "--adapter-path", tmp_path / "out"),
        ("evaluate", *usual, *DPO, "--split", "train"),
        ("compare", "--model", model, "--prompt", "What is rain?", "--adapter-path", theirs),
    ):
        done = run(*words)
        assert done.exit_code == 3, done.output
        assert "40 embedding rows" in done.output
    assert not (tmp_path / "ref").exists()
    assert not (tmp_path / "out").exists()


def test_lengths_beyond_learned_positions_are_cut(place, tmp_path):
    positions = json.loads((place / "gpt2" / "config.json").read_text())["n_positions"]
    row = {"prompt": "Why?", "chosen": "x" * 3 * positions, "rejected": "No."}
    data = lines(tmp_path / "long.jsonl", row)
    done = run("check", "--model", place / "gpt2", "--data", data,
               "--max-seq-length", 4 * positions)  # fmt: skip
    assert f"the model has {positions} positions" in done.stderr
    assert f"chosen is cut from {3 * positions + 2} to" in done.output
    done = run("compare", "--model", place / "gpt2", "--prompt", "Why?", "--max-tokens", positions,
               "--adapter-path", adapter(place, tmp_path))  # fmt: skip
    (most,) = re.findall(r"--max-tokens is (\d+) here: the longest prompt", done.stderr)
    assert 0 < int(most) < positions


def test_template_variables_are_part_of_what_a_cache_is_of(place, tmp_path):
    model = with_template(
        place, tmp_path, lambda text: "{% if shout is defined %}!{% endif %}" + text
    )
    usual = ("--model", model, "--data", place / "data", *DPO)
    assert run("precompute", *usual, "--output", tmp_path / "ref").exit_code == 0
    loud = ("--chat-template-args", '{"shout": true}')
    done = run("train", *usual, *loud, "--reference", tmp_path / "ref", "--iters", 1,
               "--adapter-path", tmp_path / "out")  # fmt: skip
    assert done.exit_code != 0
    assert "tokenizer" in done.output
    slip = run("check", *usual[:4], "--chat-template-args", '{"shuot": true}')
    assert "no variable 'shuot'" in slip.stderr
    assert run("check", *usual[:4], "--chat-template-args", "{").exit_code == 2
    yaml = tmp_path / "c.yaml"
    yaml.write_text("chat_template_args: {shout: true}\n")
    assert run("check", *usual[:4], "-c", yaml).exit_code in (0, 3)


def test_an_adapter_of_another_template_is_named(place, tmp_path):
    """`fuse` gives its folder that template; until then the adapter is asked as the model is."""
    folder = adapter(place, tmp_path)
    text = (place / "model/chat_template.jinja").read_text()
    template = folder / "chat_template.jinja"
    template.write_text(text + "{# mine #}")
    words = ("chat", "--model", place / "model", "--adapter-path", folder)
    said = f"--chat-template {template} asks as in training"
    assert said in run(*words, "--prompt", "A?", "--max-tokens", 1).stderr
    template.write_text(text)  # as some trainers leave beside every adapter
    assert "as in training" not in run(*words, "--prompt", "A?", "--max-tokens", 1).stderr
    template.write_text(text + "{# mine #}")
    given = (*words, "--chat-template", template, "--prompt", "A?", "--max-tokens", 1)
    assert "as in training" not in run(*given).stderr


def test_fuse_measures_on_the_prompts_that_the_fused_folder_is_asked(place, tmp_path, monkeypatch):
    seen = []
    module = importlib.import_module("fpo_mlx.pipeline.fuse")
    read = module.read_pairs
    monkeypatch.setattr(
        module, "read_pairs", lambda job, *rest: seen.append(job.tokenizer) or read(job, *rest)
    )
    folder = adapter(place, tmp_path)
    text = (place / "model/chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(text + "{# mine #}")
    done = run(
        "fuse", "--model", place / "model", "--adapter-path", folder, "--save-path",
        tmp_path / "fused", "--verify", place / "data",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert [tokenizer.templates["default"].endswith("{# mine #}") for tokenizer in seen] == [True]


def test_an_adapter_of_another_model_is_named(place, tmp_path):
    usual = ("--data", place / "data", *DPO)
    adapter(place, tmp_path)
    said = f"the adapter {tmp_path / 'theirs'} was made for another model"
    words = ("evaluate", *usual, "--split", "train", "--adapter-path", tmp_path / "theirs")
    words = (*words, "--samples", 0)
    assert said in run(*words, "--model", place / "model").stderr
    assert said not in run(*words, "--model", place / "other").stderr


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_sae_train_reads_the_forms_and_columns_that_train_reads(place, tmp_path, tokens):
    parts = [{"type": "text", "text": "What is the capital of France?"}]
    call = [{"type": "function", "function": {"name": "w", "arguments": "{}"}}]
    answers = ("The capital of France is Paris.", "The sea and the rain and the stars.")
    chats = [
        {"messages": [{"role": "user", "content": parts},
                      {"role": "assistant", "content": answers[n % 2]}]} for n in range(40)
    ]  # fmt: skip
    calls = [
        {"messages": [{"role": "user", "content": "Weather?"},
                      {"role": "assistant", "content": None, "tool_calls": call},
                      {"role": "tool", "content": "rain"},
                      {"role": "assistant", "content": answers[n % 2]}]} for n in range(40)
    ]  # fmt: skip
    orca = [{"question": "Weather?", "better": answers[n % 2], "worse": "No."} for n in range(40)]
    names = ("--prompt-feature", "question", "--chosen-feature", "better",
             "--rejected-feature", "worse")  # fmt: skip
    for kind, rows, words in (("parts", chats, ()), ("calls", calls, ()), ("orca", orca, names)):
        done = run(
            "sae", "train", "--model", place / "model", "--tokens", tokens, *words,
            "--data", lines(tmp_path / f"{kind}.jsonl", *rows), "--training-tokens", 256,
            "--width", 64, "--batch-size", 64, "--output", tmp_path / kind,
        )  # fmt: skip
        assert done.exit_code == 0, (kind, done.output)
