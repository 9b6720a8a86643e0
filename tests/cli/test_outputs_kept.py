"""Every command that writes, before everything that could be lost: refused, the bytes untouched."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from command_line import ROWS, lines, random_sae, run, train, usual

from fpo_mlx.sae.convert import write_saelens

pytest.importorskip("mlx.core")

from fpo_mlx.pipeline.device_check import runs as device_runs  # noqa: E402
from fpo_mlx.pipeline.train import RUN  # noqa: E402
from fpo_mlx.storage import outputs  # noqa: E402
from fpo_mlx.train.checkpoint import AdapterFolder  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, an SAE, pairs, a run, a cache and vectors; copied for every test."""
    root = tmp_path_factory.mktemp("kept")
    tiny_models.tiny_llama(root / "model", tokenizer=True)
    sae = random_sae(tiny_models.HIDDEN)
    write_saelens(sae, root / "sae")
    unit = sae.w_dec / np.linalg.norm(sae.w_dec, axis=1, keepdims=True)
    write_saelens(replace(sae, activation="topk", k=6, w_dec=unit), root / "topk")
    more = ({**ROWS[0], "prompt": f"Which is {n}?"} for n in range(20))
    lines(root / "data/train.jsonl", *ROWS, *more)
    lines(root / "others.jsonl", *({"text": f"Quite another thing, {n}."} for n in range(4)))
    lines(root / "words.jsonl", *({"text": f"word {n}"} for n in range(4)))
    lines(root / "prompts.jsonl", *({"prompt": f"word {n}"} for n in range(4)))
    np.save(root / "x.npy", np.zeros((2, tiny_models.HIDDEN), np.float32))
    rest = {"tokens": 3, "finish": "stop", "logp": -1.0, "seed": 0, "temp": 1.0, "model": "m"}
    sides = [{"text": text, **rest} for text in ("Yes.", "No, no.")]
    lines(root / "candidates.jsonl", {"id": "1", "prompt": "Why?", "candidates": sides})
    os.environ["FPO_MLX_CACHE"] = str(root / "user-cache")
    judged = ["--reward", "brevity", "--output", root / "verdicts.jsonl"]
    done = run("pairs", "judge", root / "candidates.jsonl", *judged)
    assert done.exit_code == 0, done.stderr
    done = run("precompute", *usual(root), "--output", root / "ref")
    assert done.exit_code == 0, done.stderr
    done = train(root, root / "run", "--iters", 1, "--reference", root / "ref")
    assert done.exit_code == 0, done.stderr
    del os.environ["FPO_MLX_CACHE"]
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "in", symlinks=True)
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def _with_adapter(p):
    return [*usual(p), "--top-k", 5, "--adapter-path", p / "run", "--split", "train"]


def _evaluate(p):
    return ["evaluate", *_with_adapter(p), "--samples", 0]


def _sae_train(p):
    few = ["--training-tokens", 64, "--batch-size", 4, "--width", 64, "--k", 6]
    return ["sae", "train", "--model", p / "model", "--data", p / "words.jsonl", "--layer", 1, *few]


def _warm(p):
    few = ["--training-tokens", 64, "--batch-size", 4, "--init", p / "topk"]
    return ["sae", "train", "--model", p / "model", "--data", p / "words.jsonl", *few]


def _find(p):
    texts = ["--positive", p / "words.jsonl", "--negative", p / "others.jsonl"]
    return ["features", "find", "--model", p / "model", "--sae", p / "sae", *texts]


def _lessons(p):
    return ["features", "data", *usual(p), "--reference", p / "ref"]


def _show(p):
    return ["features", "show", 3, *usual(p), "--split", "train"]


def _build(p):
    return ["pairs", "build", p / "candidates.jsonl", "--verdicts", p / "verdicts.jsonl", "--force"]


def _train(p):
    return ["train", *usual(p), "--top-k", 5, "--iters", 1]


FEW = ("--max-tokens", 4)
FOLDERS = {  # command -> (its words without the place, the option of the place, what it reads)
    "train": (_train, "--adapter-path", "model"),
    "train from an adapter": (
        lambda p: [*_train(p), "--init-adapter", p / "run"], "--adapter-path", "run",
    ),
    "fuse": (
        lambda p: ["fuse", "--model", p / "model", "--adapter-path", p / "run"], "--save-path",
        "model",
    ),
    "export": (lambda p: ["export", "--adapter-path", p / "run"], "--output", "run"),
    "convert": (lambda p: ["convert", "--hf-path", p / "model"], "--mlx-path", "model"),
    "sae convert": (lambda p: ["sae", "convert", p / "sae"], "--output", "sae"),
    "sae train": (_sae_train, "--output", "model"),
    "sae train --init": (_warm, "--output", "topk"),
    "sae train --store": (lambda p: [*_sae_train(p), "--output", "new"], "--store", "model"),
    "check --fix": (lambda p: ["check", "--data", p / "data"], "--fix", "data"),
    "precompute": (lambda p: ["precompute", *usual(p)], "--output", "model"),
    "cache merge": (lambda p: ["cache", "merge", p / "ref"], "--output", "ref"),
    "pairs build": (
        _build,
        "--output", "data",
    ),
    "features data": (lambda p: [*_lessons(p), "--select", 2], "--output", "data"),
    "demo": (lambda p: ["demo"], "--output", None),
}  # fmt: skip
FILES = {
    "evaluate --json": (_evaluate, "--json", "data/train.jsonl"),
    "evaluate --csv": (_evaluate, "--csv", "data/train.jsonl"),
    "features --json": (lambda p: ["features", *_with_adapter(p)], "--json", "model/config.json"),
    "features --csv": (lambda p: ["features", *_with_adapter(p)], "--csv", "model/config.json"),
    "features find --output": (_find, "--output", "words.jsonl"),
    "features find --json": (_find, "--json", "words.jsonl"),
    "features show --output": (_show, "--output", "data/train.jsonl"),
    "features show --json": (_show, "--json", "sae/cfg.json"),
    "features data --json": (_lessons, "--json", "data/train.jsonl"),
    "features data --csv": (_lessons, "--csv", "sae/cfg.json"),
    "features data --save-reward": (_lessons, "--save-reward", "model/config.json"),
    "compare --output": (
        lambda p: ["compare", "--model", p / "model", "--adapter-path", p / "run", "--prompt", "a",
                   *FEW],
        "--output", "run/run.json",
    ),
    "report": (lambda p: ["report", p / "run"], "--output", "run/metrics.jsonl"),
    "plan --json": (lambda p: ["plan", *usual(p), "--top-k", 5], "--json", "sae/cfg.json"),
    "check --json": (lambda p: ["check", "--data", p / "data"], "--json", "data/train.jsonl"),
    "fuse --json": (
        lambda p: ["fuse", "--model", p / "model", "--adapter-path", p / "run", "--save-path", "f"],
        "--json", "run/adapters.safetensors",
    ),
    "sae train --json": (lambda p: [*_sae_train(p), "--output", "s"], "--json", "words.jsonl"),
    "sae list": (lambda p: ["sae", "list"], "--json", None),
    "sae info": (lambda p: ["sae", "info", p / "sae"], "--json", "sae/cfg.json"),
    "sae encode": (
        lambda p: ["sae", "encode", "--sae", p / "sae", "--input", p / "x.npy"], "--output",
        "x.npy",
    ),
    "sae evaluate": (
        lambda p: ["sae", "evaluate", "--model", p / "model", "--sae", p / "sae", "--data",
                   p / "data"], "--json", "data/train.jsonl",
    ),
    "cache info": (lambda p: ["cache", "info", p / "ref"], "--json", "ref/manifest.json"),
    "cache verify": (
        lambda p: ["cache", "verify", p / "ref", *usual(p)], "--json", "ref/manifest.json",
    ),
    "cache merge --json": (
        lambda p: ["cache", "merge", p / "ref", "--output", "m"], "--json", "ref/manifest.json",
    ),
    "cache list": (lambda p: ["cache", "list", "--folder", p], "--json", "ref/manifest.json"),
    "cache export": (lambda p: ["cache", "export", p / "ref"], "--output", "ref/manifest.json"),
    "pairs generate": (
        lambda p: ["pairs", "generate", "--model", p / "model", "--prompts", p / "prompts.jsonl",
                   *FEW],
        "--output", "prompts.jsonl",
    ),
    "pairs judge": (
        lambda p: ["pairs", "judge", p / "candidates.jsonl", "--reward", "brevity"], "--output",
        "candidates.jsonl",
    ),
    "pairs rate": (
        lambda p: ["pairs", "rate", p / "candidates.jsonl", "--no-browser"], "--output",
        "candidates.jsonl",
    ),
    "pairs build --json": (
        _build,
        "--json", "candidates.jsonl",
    ),
    "doctor": (lambda p: ["doctor", "--no-hub"], "--json", None),
    "doctor --device-check": (lambda p: ["doctor", "--device-check"], "--json", None),
}  # fmt: skip


def state(top: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its bytes, and every link with its target."""
    found = {}
    for folder, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def refused_and_untouched(
    words, top: Path, name: str, *said: object, code: int = 2, new: Path | None = None
):
    """said: parts of the message; new: a file that appears meanwhile, with "mine" in it."""
    before = state(top)
    done = run(*words)
    assert isinstance(done.exception, SystemExit), (name, done.exception)
    assert done.exit_code == code, (name, done.output)
    assert "Traceback" not in done.output
    for part in said:
        assert str(part) in done.stderr, (name, done.stderr)
    assert new is None or new.read_text() == "mine", name
    after = state(top)
    after.pop(str(new), None)
    # the reference's scores are kept, whatever becomes of a run that wanted them
    scores = {path for path in after if Path(path).is_relative_to(top / "user-cache")}
    assert {path: after[path] for path in after if path not in scores - set(before)} == before, name


def notes(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("my notes")
    return folder


def project(folder: Path) -> Path:
    """A folder of the user's own that happens to have the names of a model's and a run's files."""
    for name in ("config.json", "cfg.json", "run.json", "adapter_config.json", "manifest.json"):
        (notes(folder) if not folder.exists() else folder).joinpath(name).write_text("{}")
    return folder


def another_run(made: Path, folder: Path) -> Path:
    return Path(shutil.copytree(made / "run", folder))


def bare(path: Path) -> Path:
    """One line without a newline, as `printf` leaves it: no half-written record of ours."""
    path.write_text("my notes")
    return path


def link(place: Path, target: Path) -> Path:
    place.symlink_to(target)
    return place


FOREIGN_FOLDERS = {
    "a folder with notes": lambda p, t: notes(t / "out"),
    "a project with a config.json": lambda p, t: project(t / "out"),
    "another run": lambda p, t: another_run(p, t / "out"),
    "a model": lambda p, t: shutil.copytree(p / "model", t / "out"),
    "an SAE": lambda p, t: shutil.copytree(p / "sae", t / "out"),
    "an adapter of mlx-lm": lambda p, t: (
        another_run(p, t / "out"), os.remove(t / "out/run.json"), t / "out")[-1],
    "a file": lambda p, t: lines(t / "out", {"mine": 1}),
    "a link to a folder": lambda p, t: link(t / "out", notes(t / "real")),
    "the folder around everything": lambda p, t: t,
}  # fmt: skip
# they go on with what is theirs, and name the place alone
OTHER_RULE = ("precompute", "cache merge", "pairs generate", "pairs judge", "pairs rate")
WHOLE = ("fuse", "export", "convert", "sae convert", "check --fix", "pairs build")


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("content", FOREIGN_FOLDERS)
def test_a_folder_that_holds_other_things_is_not_written_to(place, tmp_path, name, content):
    words, flag, _ = FOLDERS[name]
    there = FOREIGN_FOLDERS[content](place, tmp_path)
    said = [there.name] if name in OTHER_RULE else [flag, there.name]
    code = 1 if name in OTHER_RULE and there != tmp_path else 2
    call = f"{name} on {content}"
    refused_and_untouched([*words(place), flag, there], tmp_path, call, *said, code=code)


@pytest.mark.parametrize("name", [n for n, (_, _, reads) in FOLDERS.items() if reads])
def test_what_a_command_reads_is_never_its_folder(place, tmp_path, name):
    """By its own name, by others, and with --overwrite."""
    words, flag, reads = FOLDERS[name]
    own = place / reads
    more = [] if name in ("precompute", "cache merge") else ["--overwrite"]
    names = (own, link(tmp_path / "link", own), own / ".." / own.name, Path("in") / reads)
    for there in names:
        refused_and_untouched([*words(place), flag, there, *more], tmp_path, f"{name}: {there}")
    if name in WHOLE:  # others could be written beside what is read
        refused_and_untouched([*words(place), flag, place, *more], tmp_path, f"{name}: around")


# one fetches a model, one waits for its user: tests/unit/demo and test_pairs_rate run them whole
ALONE = ("demo", "pairs rate")


@pytest.mark.parametrize("name", [n for n in (*FOLDERS, *FILES) if n not in ALONE])
def test_the_same_call_with_an_empty_place_is_done(place, tmp_path, monkeypatch, name):
    """So that no call above is refused for another reason than its place."""
    for part in ("backbones", "starts", "updates"):  # of the device check; its own tests run them
        monkeypatch.setattr(device_runs, part, lambda *_: iter(()))
    words, flag, _ = (FOLDERS | FILES)[name]
    there = tmp_path / ("out" if name in FOLDERS else "out.json")
    done = run(*words(place), flag, there)
    assert done.exit_code == 0, (done.exception, done.stderr)
    assert there.exists()


FOREIGN_FILES = {
    "a text": lambda p, t: lines(t / "out.json", {"mine": 1}),
    "a folder": lambda p, t: notes(t / "out.json"),
    "a line without an end": lambda p, t: bare(t / "out.json"),
    "a link": lambda p, t: link(t / "out.json", lines(t / "real.json", {"mine": 1})),
    "an older result": lambda p, t: lines(t / "out.json", {"summary": {}}),
}
NO_LINES = ("a folder", "a line without an end")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", FOREIGN_FILES)
def test_a_file_that_is_there_is_not_written_over(place, tmp_path, name, content):
    words, flag, _ = FILES[name]
    there = FOREIGN_FILES[content](place, tmp_path)
    said = [there.name] if name in OTHER_RULE else [flag, there.name]
    # what is a file of lines, and none of these, is bad data; what is none cannot be written to
    code = 2 if name not in OTHER_RULE else 1 if content in NO_LINES else 3
    call = f"{name} on {content}"
    refused_and_untouched([*words(place), flag, there], tmp_path, call, *said, code=code)


@pytest.mark.parametrize("name", [n for n, (_, _, reads) in FILES.items() if reads])
def test_what_a_command_reads_is_never_its_file(place, tmp_path, name):
    """By its own name, by others, and with --overwrite."""
    words, flag, reads = FILES[name]
    own, ending = place / reads, ".json"
    os.link(own, tmp_path / f"hard{ending}")
    names = [link(tmp_path / f"link{ending}", own), tmp_path / f"hard{ending}"]
    if name != "compare --output":
        names.append(own)  # compare wants .json or .md
    for there in names:
        words_ = [*words(place), flag, there, "--overwrite"]
        if there.name == f"hard{ending}" and own.parent != place:
            continue  # a part of a folder that is read, under a name outside: not to be known
        refused_and_untouched(words_, tmp_path, f"{name}: {there}")


def test_overwrite_replaces_an_older_run_and_keeps_what_is_not_of_a_run(place, tmp_path):
    out = another_run(place, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    old = (out / "adapters.safetensors").read_bytes()
    words = [*_train(place), "--reference", place / "ref", "--seed", 3, "--adapter-path", out]
    assert "--resume" in run(*words[:-1], place / "run").stderr
    done = run(*words, "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert (out / "adapters.safetensors").read_bytes() != old
    assert (out / "notes.txt").read_text() == "mine"


def test_of_an_older_run_no_adapter_is_left_to_be_taken_for_the_new_ones(place, tmp_path):
    """A run that ends before its first checkpoint has none; a copy of the user's own stays."""
    out = another_run(place, tmp_path / "out")
    for name in ("good_adapters.safetensors", "0000001_adapters.safetensors"):
        shutil.copyfile(out / "adapters.safetensors", out / name)
    AdapterFolder(out, {}).start({})
    assert {path.name for path in out.glob("*.safetensors")} == {"good_adapters.safetensors"}
    assert not (out / "adapter_config.json").exists()
    assert RUN.foreign(out, outputs.contents(out)) == ["good_adapters.safetensors"]


def test_overwrite_leaves_what_is_not_of_a_run_in_the_folders_of_a_run(place, tmp_path):
    out = another_run(place, tmp_path / "out")
    for folder in ("best", "checkpoint"):
        (out / folder).mkdir(exist_ok=True)
        (out / folder / "mine.bin").write_text("mine")
    words = [*_train(place), "--reference", place / "ref", "--adapter-path", out, "--overwrite"]
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    assert all((out / folder / "mine.bin").exists() for folder in ("best", "checkpoint"))


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_a_link_within_a_run_is_not_written_through(place, tmp_path, how):
    out = another_run(place, tmp_path / "out")
    (out / "adapters.safetensors").unlink()
    link(out / "adapters.safetensors", place / "run/adapters.safetensors")
    words = [*_train(place), "--iters", 2, "--reference", place / "ref", "--adapter-path", out, how]
    refused_and_untouched(words, tmp_path, how, "adapters.safetensors", "link")


def test_a_demo_takes_no_data_folder_that_it_did_not_make(place, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(place / "data", out / "data")
    words = ["demo", "--output", out, "--overwrite"]
    refused_and_untouched(words, tmp_path, "demo", "--output", "data/", "Name a new folder")


def test_what_appears_while_a_command_works_is_not_written_over(place, tmp_path, monkeypatch):
    """Hours lie between the first look and the writing."""
    from fpo_mlx.model import adapters, fuse

    trains = importlib.import_module("fpo_mlx.pipeline.train")

    def meanwhile(module, name, path):
        real = getattr(module, name)

        def does(*args, **values):
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_text("mine")
            return real(*args, **values)

        monkeypatch.setattr(module, name, does)

    meanwhile(trains, "reference_of", tmp_path / "out/best/adapters.safetensors")
    refused_and_untouched(
        [*_train(place), "--adapter-path", tmp_path / "out"], tmp_path, "train", "best/",
        new=tmp_path / "out/best/adapters.safetensors",
    )  # fmt: skip
    meanwhile(fuse, "fuse_layers", tmp_path / "fused/model.safetensors")
    words = ["fuse", "--model", place / "model", "--adapter-path", place / "run"]
    refused_and_untouched(
        [*words, "--save-path", tmp_path / "fused"], tmp_path, "fuse", "model.safetensors",
        new=tmp_path / "fused/model.safetensors",
    )  # fmt: skip
    meanwhile(adapters, "peft_config", tmp_path / "peft/mine.txt")
    words = ["export", "--adapter-path", place / "run", "--output", tmp_path / "peft"]
    refused_and_untouched(words, tmp_path, "export", "mine.txt", new=tmp_path / "peft/mine.txt")


LONG = {  # what a command does between its two looks at the place
    "sae info": "sae_info",
    "sae encode": "sae_encode",
    "features find --output": "find_features",
    "features show --output": "feature_page",
    "features data --save-reward": "features_data",
    "report": "report_page",
}


@pytest.mark.parametrize("name", LONG)
def test_a_result_whose_place_was_taken_meanwhile_goes_beside_it(
    place, tmp_path, monkeypatch, name
):
    from fpo_mlx import pipeline

    real, out = getattr(pipeline, LONG[name]), tmp_path / "out.json"

    def meanwhile(*args, **values):
        out.write_text("mine")
        return real(*args, **values)

    monkeypatch.setattr(pipeline, LONG[name], meanwhile)
    words, flag, _ = FILES[name]
    done = run(*words(place), flag, out)
    assert done.exit_code == 0, done.stderr
    assert out.read_text() == "mine"
    assert (tmp_path / "out-2.json").stat().st_size
    assert "out-2.json" in done.stderr


def test_an_option_that_was_not_given_still_names_what_is_read(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "adapters")
    words = ["fuse", "--model", place / "model", "--save-path", tmp_path / "fused"]
    place_ = tmp_path / "adapters/adapters.safetensors"
    refused_and_untouched(
        [*words, "--json", place_, "--overwrite"], tmp_path, "fuse", "--json", place_
    )


def test_a_word_that_is_no_place_is_not_taken_for_one(place, tmp_path):
    lines(tmp_path / "train/scores.json", {"mine": 1})  # `--split train`
    words = [*_evaluate(place), "--reference", place / "ref"]
    out = tmp_path / "train/scores.json"
    assert run(*words, "--json", out).exit_code == 2
    done = run(*words, "--json", out, "--overwrite")
    assert done.exit_code == 0, done.stderr


def test_checked_rows_are_one_set_and_not_two(place, tmp_path):
    lines(tmp_path / "clean/valid.jsonl", *ROWS)
    lines(tmp_path / "clean/train.jsonl", *ROWS)
    done = run("check", "--data", place / "data", "--fix", tmp_path / "clean", "--overwrite")
    assert done.exit_code == 0, done.stderr
    assert [p.name for p in (tmp_path / "clean").iterdir()] == ["train.jsonl"]


def test_results_in_the_folder_of_their_run_can_be_replaced(place, tmp_path):
    words = ["report", place / "run", "--output", place / "run/report.html"]
    pytest.importorskip("matplotlib")
    assert run(*words).exit_code == 0
    assert run(*words).exit_code == 2
    assert run(*words, "--overwrite").exit_code == 0


def test_a_result_can_go_to_a_pipe(place, tmp_path):
    done = run("sae", "info", place / "sae", "--json", "/dev/stderr")
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path(place / "sae/cfg.json").read_text())
