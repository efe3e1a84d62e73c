"""Memory that is freed is kept for what comes next. It is a property of a process, so each test has one of its own."""

import json
import os
import subprocess
import sys

import pytest
from places import TESTS

from textgym.engine.freed_memory import SETTINGS

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs the GNU C library")
PAGES = 40 * 2**20 // 4096  # of what is allocated again and again, more than the 32 MiB that are always given back
# Pages that the system had to provide, per allocation, after the first ones. An aligned block leaves a scrap on either
# side. The C library sets up to 7 scraps of a size aside before it joins them with their neighbours again, and until
# then the next block may have to be a new one: up to 9 of the first allocations were.
COUNT = """
import resource, torch

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def allocate(times):
    for _ in range(times):
        torch.ones(10 * 2**20)  # 40 MiB

def pages_per_allocation():
    allocate(32)
    before = pages()
    allocate(8)
    return (pages() - before) / 8
"""


def ask(code: str, **environment: str) -> list[float]:
    """What the lines of ``code`` put into ``answers``."""
    clean = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "GLIBC_TUNABLES")}
    script = f"{COUNT}\nanswers = []\n{code}\nimport json; print(json.dumps(answers))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**clean, **environment},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[float] = json.loads(run.stdout.splitlines()[-1])
    return answers


ONCE = """
from textgym.engine.freed_memory import keep_freed_memory
answers += [pages_per_allocation(), keep_freed_memory(), pages_per_allocation()]
"""


@linux
def test_large_blocks_are_not_asked_of_the_system_again():
    before, kept, after = ask(ONCE)
    assert before > PAGES / 2, "the C library has given large blocks back, else there is nothing to gain"
    assert kept is True
    assert after < PAGES / 100


@linux
@pytest.mark.parametrize(
    "environment", [{"MALLOC_TOP_PAD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_settings_of_the_environment_stay(environment):
    before, kept, after = ask(ONCE, **environment)
    assert kept is False
    assert min(before, after) > PAGES / 2


def test_another_c_library_is_left_alone(monkeypatch):
    from textgym.engine import freed_memory

    monkeypatch.setattr(freed_memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.delattr(freed_memory.ctypes, "CDLL")  # where it could not be asked
    assert freed_memory.keep_freed_memory() is False


@linux
def test_agents_keep_it_when_they_learn():
    learn = """
import gymnasium as gym, textgym
from textgym.agents import PPO

env = gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=2)
model = PPO("LanguageModelPolicy", env, n_steps=2, n_epochs=1, device="cpu")
answers.append(pages_per_allocation())
model.learn(4)
answers.append(pages_per_allocation())
"""
    before, after = ask(learn)
    assert before > PAGES / 2, "making an agent changes nothing"
    assert after < PAGES / 100
