"""The process in which a reward function runs: JSON lines in, JSON lines out, limits on itself.

It imports nothing of this package, so that it starts fast and holds nothing of the run.
"""

import contextlib
import importlib.util
import inspect
import json
import os
import resource
import signal
import sys

MODULE = "_reward_of_the_user"  # nobody's name: "reward" could be a file that this one imports


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this one
    path, name, memory = sys.argv[1], sys.argv[2], int(float(sys.argv[3]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the function prints does not come between its answers
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):  # a Mac keeps neither, or one
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (memory, memory))
    try:
        function = find(path, name)
        many = next(iter(inspect.signature(function).parameters), "") == "prompts"
        tell(answers, {"ready": True})
    except BaseException as error:  # a user's file may do anything, exit among it
        tell(answers, {"error": describe(error)})
        return
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if many:
                prompts = [asked["prompt"]] * len(asked["answers"])
                scores = list(function(prompts, asked["answers"]))
            else:
                scores = [function(asked["prompt"], answer) for answer in asked["answers"]]
            tell(answers, {"scores": [float(score) for score in scores]})
        except BaseException as error:
            tell(answers, {"error": describe(error)})


def find(path: str, name: str):
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # a dataclass of the file looks for its module there
    spec.loader.exec_module(module)
    return getattr(module, name)


def tell(out, value: dict) -> None:
    out.write(json.dumps(value) + "\n")
    out.flush()


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


if __name__ == "__main__":
    main()
