"""`fpo-mlx pairs generate` as a user gives it."""

from __future__ import annotations

import importlib
import json

import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from command_line import lines, refused, run  # noqa: E402
from evaluated import own_cache, place  # noqa: E402, F401

from fpo_mlx.errors import DataError  # noqa: E402
from fpo_mlx.pairs.prompts import check_prompts, read_prompts  # noqa: E402

PROMPTS = ["Why?", "Who are you, and where do you come from?", "Name it."] + [
    f"Question {n}, of which there are some?" for n in range(6)
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def generate(place, prompts, out, *words):
    flags = ["--model", place / "model", "--prompts", prompts, "--output", out]
    return run("pairs", "generate", *flags, "--n", 3, "--max-tokens", 6, *words)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_gets_n_answers_with_what_made_them(place, prompts, tmp_path):
    done = generate(place, prompts, tmp_path / "c.jsonl", "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.stderr
    found = records(tmp_path / "c.jsonl")
    assert sorted(row["prompt"] for row in found) == sorted(PROMPTS)
    for row in found:
        assert len(row["candidates"]) == 3
        for answer in row["candidates"]:
            assert set(answer) == {"text", "tokens", "finish", "logp", "seed", "temp", "model"}
            assert answer["logp"] < 0
            assert (answer["finish"] == "length") == (answer["tokens"] == 6)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["answers"] == 27
    assert "27 answers to 9 prompts" in done.stdout


def test_of_prompts_that_all_have_their_answers_none_is_tokenized(
    place, prompts, tmp_path, monkeypatch
):
    assert generate(place, prompts, tmp_path / "c.jsonl").exit_code == 0
    refuse = lambda *_: pytest.fail("a prompt was tokenized")  # noqa: E731
    monkeypatch.setattr("fpo_mlx.data.tokenizer.ChatTokenizer.encode", refuse)
    done = generate(place, prompts, tmp_path / "c.jsonl")
    assert done.exit_code == 0, done.stderr
    assert "0 answers to 0 prompts" in done.stdout


def parted(path):
    """(the rows without their log-probs, the log-probs): these differ by rounding in a batch."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return rows, [one.pop("logp") for row in rows for one in row["candidates"]]


def test_a_run_cut_at_any_place_goes_on_to_the_same_answers(place, prompts, tmp_path):
    out = tmp_path / "c.jsonl"
    assert generate(place, prompts, out).exit_code == 0
    want, (rows, logps) = out.read_bytes(), parted(out)
    for cut in (0, 7, len(want) // 3, len(want) // 2, len(want) - 1):
        out.write_bytes(want[:cut])
        done = generate(place, prompts, out)
        assert done.exit_code == 0, done.stderr
        assert "warning" not in done.stderr
        found, near = parted(out)
        assert found == rows
        assert near == pytest.approx(logps, abs=1.5e-4)  # they have four decimals
    again = generate(place, prompts, out)
    assert "0 answers to 0 prompts" in again.stdout
    assert "every prompt has answers already" in again.stderr


def test_prompts_that_have_fewer_answers_than_are_asked_for_are_told(place, prompts, tmp_path):
    out = tmp_path / "c.jsonl"
    assert generate(place, prompts, out).exit_code == 0
    again = generate(place, prompts, out, "--n", 4)
    assert "9 of 9 prompts" in again.stderr
    assert "have fewer answers than --n 4" in again.stderr


def test_prompts_that_a_template_makes_new_are_told(place, prompts, tmp_path):
    out = tmp_path / "c.jsonl"
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}!{% endfor %}")
    assert generate(place, prompts, out).exit_code == 0
    other = generate(place, prompts, out, "--chat-template", template)
    assert other.exit_code == 0, other.stderr
    assert "none of the first 9 prompts is among the 9 that have answers" in other.stderr
    assert len(records(out)) == 18


def test_answers_do_not_depend_on_how_many_are_in_work(place, prompts, tmp_path):
    for rows in (1, 5, 32):
        done = generate(place, prompts, tmp_path / f"{rows}.jsonl", "--rows", rows)
        assert done.exit_code == 0, done.stderr
    for row in zip(*(records(tmp_path / f"{rows}.jsonl") for rows in (1, 5, 32)), strict=True):
        texts = [[c["text"] for c in one["candidates"]] for one in row]
        assert texts[0] == texts[1] == texts[2]
        logps = [[c["logp"] for c in one["candidates"]] for one in row]
        assert logps[0] == pytest.approx(logps[1], abs=1e-3)


def test_other_prompts_beside_it_change_no_answer(place, prompts, tmp_path):
    assert generate(place, prompts, tmp_path / "all.jsonl").exit_code == 0
    (tmp_path / "one.txt").write_text(PROMPTS[4] + "\n")
    assert generate(place, tmp_path / "one.txt", tmp_path / "one.jsonl").exit_code == 0
    everywhere = {row["id"]: row for row in records(tmp_path / "all.jsonl")}
    (alone,) = records(tmp_path / "one.jsonl")
    assert alone == everywhere[alone["id"]]


def test_an_adapter_changes_answers_and_a_persons_answer_comes_along(place, tmp_path):
    rows = lines(tmp_path / "p.jsonl", {"prompt": "Why?", "system": "Be kind.", "answer": "So."})
    for name, words in (("base", ()), ("one", ("--adapter-path", place / "one"))):
        done = generate(place, rows, tmp_path / f"{name}.jsonl", *words)
        assert done.exit_code == 0, done.stderr
    base, tuned = (records(tmp_path / f"{name}.jsonl")[0] for name in ("base", "one"))
    assert base["id"] == tuned["id"]
    assert base["prompt"][0] == {"role": "system", "content": "Be kind."}
    texts = [[c["text"] for c in row["candidates"]] for row in (base, tuned)]
    assert texts[0][:3] != texts[1][:3]
    assert base["candidates"][3]["model"] == "human"
    assert texts[0][3] == "So."


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (("--n", 0), 2, ("--n 0",)),
        (("--temp", 0), 2, ("--temp 0", "the same")),
        (("--temp", "nan"), 2, ("--temp",)),
        (("--max-tokens", 3000), 3, ("tokens", "--max-seq-length")),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_a_file_is_made(
    place, prompts, tmp_path, words, code, parts
):
    refused(generate(place, prompts, tmp_path / "c.jsonl", *words), code, *parts)


def test_an_empty_file_of_prompts_is_refused_and_not_done_already(place, tmp_path):
    (tmp_path / "none.txt").write_text("\n \n")
    done = generate(place, tmp_path / "none.txt", tmp_path / "c.jsonl")
    refused(done, 3, "none.txt holds no prompts", "one per line")
    assert not (tmp_path / "c.jsonl").exists()


@pytest.mark.parametrize("row", [{"chosen": "x"}, {"prompt": 3}, {"prompt": []}, {"prompt": " "}])
def test_a_row_without_a_prompt_is_named(place, tmp_path, row):
    rows = lines(tmp_path / "p.jsonl", {"prompt": "Why?"}, row)
    refused(generate(place, rows, tmp_path / "c.jsonl"), 3, "p.jsonl:2")
    assert not (tmp_path / "c.jsonl").exists()


def test_all_prompts_that_cannot_be_asked_are_told_before_the_first_answer(
    place, tmp_path, monkeypatch
):
    """Prompts are looked at a window at a time; the fault of a late one is no late fault."""
    module = importlib.import_module("fpo_mlx.pipeline.pairs_generate")
    monkeypatch.setattr(module, "WINDOW", 2)
    (tmp_path / "p.txt").write_text("Why?\nWho?\nWhat?\n" + "long " * 200 + "\n" + "more " * 300)
    words = ("--max-tokens", 4, "--max-seq-length", 60)
    done = generate(place, tmp_path / "p.txt", tmp_path / "c.jsonl", *words)
    refused(done, 3, "2 prompts cannot be asked", "'long long", "'more more", "room for 56 tokens")
    assert not (tmp_path / "c.jsonl").exists()


def test_a_file_that_was_begun_otherwise_is_told(place, prompts, tmp_path):
    out = tmp_path / "c.jsonl"
    assert "begun otherwise" not in generate(place, prompts, out).stderr
    assert "begun otherwise" not in generate(place, prompts, out).stderr
    done = generate(place, prompts, out, "--adapter-path", place / "one", "--seed", 3)
    assert done.exit_code == 0
    assert "begun otherwise (model " in done.stderr
    assert "seed 0, now 3" in done.stderr


def test_the_last_line_of_a_text_needs_no_end(tmp_path):
    path = tmp_path / "p.txt"
    for content, wanted in (
        (b"a\nb", ["a", "b"]),
        (b"a", ["a"]),
        (b"\xef\xbb\xbfa\r\n\r\nb ", ["a", "b"]),
        ("a\n\u00e4".encode("utf-16"), ["a", "\u00e4"]),
    ):
        path.write_bytes(content)
        assert [prompt.text for prompt in read_prompts(path)] == wanted
        assert check_prompts(path) == len(wanted)


@pytest.mark.parametrize(
    ("name", "content"),
    [(".p.jsonl", '{"prompt": "Why?"}'), ("p.ndjson", '{"prompt": "Why?"}'),
     ("p.JSONL", '{"prompt": "Why?"}\n'), ("p.json", '[{"prompt": "Why?"}]'),
     ("p.csv", "prompt,system\nWhy?,\n")],
)  # fmt: skip
def test_rows_of_prompts_are_read_from_every_file_that_data_is_read_from(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (found,) = read_prompts(tmp_path / name)
    assert found.fields == {"prompt": "Why?"}


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
         {"role": "user", "content": "Why?\nHere."}]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "turns"),
    [({"instruction": "Why?", "completions": [{"response": "So."}], "source": "x"},
      [{"role": "user", "content": "Why?"}]),
     ({"instruction": "Why?", "input": "Here.", "history": [["Hi", "Hello."]], "output": ["a"]},
      TURNS),
     ({"messages": TURNS, "completion": "So.", "label": True}, TURNS),
     ({"prompt": "Why?", "context": "Other words."}, [{"role": "user", "content": "Why?"}])],
)  # fmt: skip
def test_rows_of_data_that_are_no_pairs_are_prompts_under_the_names_that_data_have(
    tmp_path, row, turns
):
    """`train` refuses them with the advice to have them answered anew."""
    (prompt,) = read_prompts(lines(tmp_path / "p.jsonl", row))
    assert list(prompt.turns) == turns


@pytest.mark.parametrize(
    ("row", "said"),
    [({"question": "Why?", "context": "A passage."}, "question and context differ"),
     ({"question": "What is this?", "image": {"bytes": "iVBO"}}, "the row has image")],
)  # fmt: skip
def test_a_prompt_of_which_a_part_would_be_left_out_is_refused(tmp_path, row, said):
    with pytest.raises(DataError, match=rf"p\.jsonl:1: {said}"):
        list(read_prompts(lines(tmp_path / "p.jsonl", row)))


def test_a_model_of_other_caches_answers_one_after_the_other(tmp_path, prompts, monkeypatch):
    from fpo_mlx.judge import slots

    tiny_models.tiny_llama(tmp_path / "model", tokenizer=True)
    assert generate(tmp_path, prompts, tmp_path / "a.jsonl").exit_code == 0
    monkeypatch.setattr(slots, "row_axes", lambda model: 0)
    assert generate(tmp_path, prompts, tmp_path / "b.jsonl").exit_code == 0
    for one, two in zip(*(records(tmp_path / f"{n}.jsonl") for n in "ab"), strict=True):
        assert [c["text"] for c in one["candidates"]] == [c["text"] for c in two["candidates"]]


def test_a_prompt_that_runs_past_a_table_of_positions_is_refused(tmp_path):
    """GPT-2 and OPT look positions up; past the end MLX reads what lies there."""
    tiny_models.tiny_gpt2(tmp_path / "model", tokenizer=True, n_positions=64)
    (tmp_path / "p.txt").write_text("Why?\n" + "long " * 60 + "\n")
    done = generate(tmp_path, tmp_path / "p.txt", tmp_path / "c.jsonl")
    refused(done, 3, "1 prompts cannot be asked", "--max-seq-length 64", "room for 58 tokens")
    assert "the model has 64 positions" in done.stderr
    assert not (tmp_path / "c.jsonl").exists()


def test_a_slip_in_the_templates_variables_is_said(place, prompts, tmp_path):
    words = ("--chat-template-args", '{"enable_thoughts": false}')
    done = generate(place, prompts, tmp_path / "c.jsonl", *words)
    assert done.exit_code == 0, done.stderr
    assert "has no variable 'enable_thoughts'" in done.stderr


def test_answers_that_were_cut_stay_so_and_that_is_said(place, prompts, tmp_path):
    out = tmp_path / "c.jsonl"
    assert generate(place, prompts, out).exit_code == 0
    before = out.read_bytes()
    done = generate(place, prompts, out, "--max-tokens", 12)
    assert done.exit_code == 0, done.stderr
    assert "answers that were cut at 6 tokens" in done.stderr
    assert "--output" in done.stderr
    assert out.read_bytes() == before
    assert "were cut at" not in generate(place, prompts, out, "--max-tokens", 5).stderr


def test_what_yaml_says_wrong_is_said_all_at_once_and_a_near_name_is_named(
    place, prompts, tmp_path
):
    yaml = tmp_path / "g.yaml"
    yaml.write_text("rows: many\nseed: 1.9\n")
    refused(generate(place, prompts, tmp_path / "c.jsonl", "-c", yaml), 2, "--rows", "--seed 1.9")
    yaml.write_text("max_token: 3\n")
    done = generate(place, prompts, tmp_path / "c.jsonl", "-c", yaml)
    refused(done, 2, "g.yaml", "Did you mean max_tokens?")
