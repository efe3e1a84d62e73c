"""Where TRL is for the benchmark: a virtual environment of its own in ``.cache/peers``, made when first asked for.

textgym never depends on what it is compared with. PPO left TRL in 1.13.0: its last release is unpacked beside, and runs
on what was installed for the newest.

    python benchmarks/peers.py      # install now what is missing, and say where it is
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "peers"
TRL, TRL_WITH_PPO = "1.16.0", "1.12.0"


class PeerError(RuntimeError):
    """A peer could not be installed."""


def is_peer(contender: str) -> bool:
    return contender.startswith("trl-")


def command_of(contender: str) -> list[str]:
    """The interpreter and the arguments that a peer's worker starts with; what is missing is installed.

    :return: the interpreter, and behind the script's place the arguments
    """
    arguments = ["--trl-path", str(trl_with_ppo())] if contender == "trl-ppo" else []
    return [str(trl_python()), *arguments]


def trl_python() -> Path:
    """The interpreter of the environment that has TRL."""
    environment = FOLDER / "trl"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = environment / f".trl-{TRL}"
    if installed.exists():
        return python
    if not has_trl(python):
        say(f"Installing TRL {TRL} into {environment} (some minutes, once) ...")
        _make_environment(environment)
        _run(*_pip(python), "install", "--constraint", str(ROOT / "constraints.txt"), "torch", f"trl=={TRL}")
    installed.touch()
    return python


def has_trl(python: Path) -> bool:
    """Whether that interpreter has the wanted version."""
    if not python.exists():
        return False
    asked = "import importlib.metadata as m; print(m.version('trl'))"
    result = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    return result.stdout.strip() == TRL


def trl_with_ppo() -> Path:
    """The folder of the unpacked release that still has PPO."""
    folder = FOLDER / "trl112"
    if (folder / "trl" / "experimental" / "ppo").is_dir():
        return folder
    say(f"Unpacking TRL {TRL_WITH_PPO} into {folder} ...")
    wheels = FOLDER / "dl"
    _run(*_pip(trl_python()), "download", "--no-deps", "--dest", str(wheels), f"trl=={TRL_WITH_PPO}")
    (wheel,) = wheels.glob(f"trl-{TRL_WITH_PPO}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _make_environment(folder: Path) -> None:
    """Some distributions ship Python without ensurepip, which ``venv`` needs; then pip installs pip."""
    try:
        _run(sys.executable, "-m", "venv", str(folder))
    except PeerError:
        _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
        _run(sys.executable, "-m", "pip", "--quiet", "--python", str(folder), "install", "pip")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PeerError(f"{' '.join(command)} failed:\n{result.stderr.strip() or result.stdout.strip()}")


if __name__ == "__main__":
    print(trl_python(), trl_with_ppo(), sep="\n")
