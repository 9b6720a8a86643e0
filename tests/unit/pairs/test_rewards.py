"""A reward function as a judge: what it may be, how it fails, and how its process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from judges import candidates, graded

from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pairs import reward as rewards
from fpo_mlx.pairs.records import read_verdicts
from fpo_mlx.pairs.settings import JudgeConfig
from fpo_mlx.pipeline import pairs_judge


def reward(tmp_path, body, name="score"):
    path = tmp_path / "mine.py"
    path.write_text(body)
    return f"{path}:{name}"


def by_reward(tmp_path, spec, count=2, **words):
    source = candidates(tmp_path / "c.jsonl", graded(count, 3))
    return pairs_judge(
        JudgeConfig(reward=spec, **words), candidates=source, output=tmp_path / "v.jsonl",
        say=lambda _: None,
    )  # fmt: skip


def test_a_reward_decides_every_comparison_and_its_prints_do_no_harm(tmp_path):
    spec = reward(
        tmp_path, "def score(prompt, answer):\n    print('hi')\n    return int(answer[-1])\n"
    )
    by_reward(tmp_path, spec, 5)
    for v in read_verdicts(tmp_path / "v.jsonl").values():
        assert v.verdict == ("a" if v.score_a > v.score_b else "b")
        assert v.order == "none"


def test_a_reward_over_lists_is_called_once_a_prompt(tmp_path):
    spec = reward(tmp_path, "def score(prompts, answers):\n    return [len(a) for a in answers]\n")
    assert by_reward(tmp_path, spec).written == 6


def test_a_reward_file_may_hold_a_dataclass_with_annotations_as_texts(tmp_path):
    spec = reward(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Grade:\n"
        "    value: float\n"
        "def score(prompt, answer):\n"
        "    return Grade(int(answer[-1])).value\n",
    )
    assert by_reward(tmp_path, spec).written == 6


def test_a_reward_file_may_import_a_file_beside_it_that_is_called_reward(tmp_path):
    (tmp_path / "reward.py").write_text("def last(answer):\n    return int(answer[-1])\n")
    spec = reward(
        tmp_path,
        "from reward import last\ndef score(prompt, answer):\n    return last(answer)\n",
    )
    assert by_reward(tmp_path, spec).written == 6


@pytest.mark.parametrize(
    ("body", "part"),
    [("return float('nan')", "nan"), ("return None", "TypeError"),
     ("raise ValueError('odd')", "odd"), ("return [1, 2]", "TypeError"),
     ("import os; os._exit(3)", "exit code 3"),
     ("while True: pass", "--timeout"), ("x = bytearray(3 * 10**9); return 1", "MemoryError"),
     ("import sys; sys.exit()", "SystemExit"), ("return float('inf')", "inf")],
)  # fmt: skip
def test_a_reward_that_fails_is_a_plain_error_with_its_row(tmp_path, body, part):
    spec = reward(tmp_path, f"def score(prompt, answer):\n    {body}\n")
    with pytest.raises(DataError, match="id Question number 0") as error:
        by_reward(tmp_path, spec, timeout=2.0, memory_gb=1.0)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("body", "limit"),
    [("while True: pass", "2 seconds; --timeout"), ("import os; os._exit(3)", "1 GB"),
     ("raise MemoryError", "1 GB"), ("raise OSError('Cannot allocate memory')", "1 GB"),
     ("raise ImportError('x.so: failed to map segment')", "1 GB")],
)  # fmt: skip
def test_a_limit_that_ends_a_reward_is_told_with_the_commands_that_raise_it(tmp_path, body, limit):
    """`pairs build` has neither flag, and said to use them."""
    spec = reward(tmp_path, f"def score(prompt, answer):\n    {body}\n")
    with pytest.raises(DataError) as error:
        by_reward(tmp_path, spec, timeout=2.0, memory_gb=1.0)
    assert limit in str(error.value)
    flag = "--timeout" if "seconds" in limit else "--memory-gb"
    assert f"{flag} of `pairs judge` or `compare`" in str(error.value)


SLOW_IMPORT = "import time\ntime.sleep(1.5)\ndef score(prompt, answer):\n    return len(answer)\n"


def test_a_file_that_imports_for_long_has_as_long_as_timeout_says(tmp_path, monkeypatch):
    """It had a minute, whatever the flag said that the message named."""
    monkeypatch.setattr(rewards, "STARTS", 0.3)
    assert by_reward(tmp_path, reward(tmp_path, SLOW_IMPORT), timeout=30.0).written == 6


def test_a_file_that_imports_for_too_long_is_told_that_it_did_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "STARTS", 0.3)
    with pytest.raises(ConfigError, match=r"^at its start: --reward .* longer than 0\.3 seconds"):
        by_reward(tmp_path, reward(tmp_path, SLOW_IMPORT), timeout=0.2)


def test_a_short_timeout_is_of_the_calls_and_not_of_the_start(tmp_path):
    assert by_reward(tmp_path, reward(tmp_path, SLOW_IMPORT), timeout=1.0).written == 6


def test_a_file_that_wants_more_memory_to_start_is_told_so_too(tmp_path):
    body = "raise ImportError('libtorch_cpu.so: failed to map segment from shared object')"
    with pytest.raises(ConfigError, match="4 GB; --memory-gb of `pairs judge` or `compare`"):
        by_reward(tmp_path, reward(tmp_path, body))


@pytest.mark.parametrize(
    "body", ["import nothing_of_the_kind", "def (", "raise SystemExit", "x = 1"]
)
def test_a_file_that_cannot_be_used_is_said_before_the_first_row(tmp_path, body):
    with pytest.raises(ConfigError, match="--reward"):
        by_reward(tmp_path, reward(tmp_path, body))


@pytest.mark.parametrize("spec", ["nothing.py:f", "no-colon", "x.py:not a name", ":f"])
def test_a_reward_that_is_not_there_is_refused(tmp_path, spec):
    with pytest.raises(ConfigError, match="--reward"):
        by_reward(tmp_path, spec)


SLOW = """
import os, sys, time
from fpo_mlx.pairs.reward import Reward
with Reward(sys.argv[1], timeout=60.0, memory_gb=4.0) as reward:
    print(reward._process.pid, flush=True)
    if sys.argv[2] == "asked":
        reward.scores("", ["an answer"], "here")
    time.sleep(60)
"""


def slow(tmp_path, what):
    """A run that waits for its reward, or for nothing; and the number of the reward's process."""
    spec = reward(tmp_path, "import time\ndef score(prompt, answer):\n    time.sleep(30)\n")
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, spec, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert run.stdout is not None
    return run, int(run.stdout.readline())


def is_gone(pid):
    """Whether a process ends soon; one that nobody has waited for yet has ended, too."""
    for _ in range(100):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout
        if not state or state.startswith(b"Z"):
            return True
        threading.Event().wait(0.1)
    return False


@pytest.mark.parametrize("what", ["asked", "idle"])
def test_ctrl_c_ends_a_reward_without_a_word_of_its_own(tmp_path, what):
    run, pid = slow(tmp_path, what)
    threading.Event().wait(0.5)  # it is in the function by now, or waits to be asked
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=20)
    assert err.count("Traceback") == 1  # the run's own, which the command line puts into words
    assert "reward_child" not in err
    assert is_gone(pid)


def test_a_reward_ends_when_the_run_is_killed(tmp_path):
    run, pid = slow(tmp_path, "idle")
    run.kill()
    run.communicate(timeout=20)
    assert is_gone(pid)


def test_ctrl_c_while_a_reward_is_read_leaves_nobody_behind(tmp_path):
    """Its file may import for a minute."""
    number = tmp_path / "number"
    body = f"import os, time\nopen({str(number)!r}, 'w').write(str(os.getpid()))\ntime.sleep(30)\n"
    run = subprocess.Popen(
        [sys.executable, "-c", SLOW, reward(tmp_path, body), "idle"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not number.exists() or not number.read_text():
        threading.Event().wait(0.1)
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=20)
    assert "reward_child" not in err
    assert is_gone(int(number.read_text()))


def test_no_verdict_is_asked_for_twice(tmp_path):
    spec = reward(tmp_path, "def score(prompt, answer):\n    return int(answer[-1])\n")
    assert by_reward(tmp_path, spec, 4).written == 12
    whole = (tmp_path / "v.jsonl").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "v.jsonl").write_bytes(whole[:cut])
        by_reward(tmp_path, spec, 4)
        again = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
        want = [json.loads(line) for line in whole.splitlines()]
        for one in (*again, *want):
            one.pop("time", None)
        assert again == want


def test_prompts_that_are_judged_already_cost_no_wait_for_the_disk(tmp_path, monkeypatch):
    """15,000 of them waited 19 s."""
    spec = reward(tmp_path, "def score(prompt, answer):\n    return int(answer[-1])\n")
    by_reward(tmp_path, spec, 4)
    waits, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (waits.append(file), real(file)))
    again = by_reward(tmp_path, spec, 4)
    assert (again.written, again.before, waits) == (0, 12, [])


@pytest.mark.parametrize("was", [None, "false"])
def test_a_process_beside_tokenizers_that_has_worked_is_no_cause_of_its_warning(
    tmp_path, monkeypatch, was
):
    """macOS forks; tokenizers then warns on stderr unless a person has decided on its threads."""
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.setenv(name, was or "")
    if was is None:
        monkeypatch.delenv(name)
    same = f"float(os.environ.get('{name}') == {was!r})"
    body = f"import os\ndef score(prompt, answer):\n    return {same}\n"
    by_reward(tmp_path, reward(tmp_path, body), 1)
    assert os.environ[name] == (was or "true")  # our own tokenizers keep their threads
    found = read_verdicts(tmp_path / "v.jsonl").values()
    assert {v.score_a for v in found} == {1.0}, "the function's process is as it was"
