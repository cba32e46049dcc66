"""How long `python -m jaxserve` takes to be ready: with nothing compiled, with programs on disk but their index gone
(every program is traced and lowered, none compiled), and as a second start; and what its imports cost.

python -m bench.start [--rounds 3] [--json FILE] [-- FLAGS of the server]

Seconds of wall-clock, and user CPU-seconds of both processes together, which neighbours on the machine disturb less.
The model must be there already; compiled programs go into a folder of this run.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from jaxserve.utils import _free_port

PROCESSES = {"front end": "import jaxserve.launch", "engine": "import jaxserve.engine.build, jaxserve.engine.loop"}


def start(folder: Path, flags: list[str]) -> dict[str, Any]:
    """One start, ended as soon as it is ready. -> seconds to ready, and of each stage the first sight of it."""
    port = _free_port()
    command = [sys.executable, "-m", "jaxserve", "--port", str(port), "--compilation-cache-dir", str(folder)]
    began, seen, stages = time.monotonic(), "", {}
    with tempfile.NamedTemporaryFile("w+") as log, tempfile.TemporaryDirectory() as store:
        process = subprocess.Popen([*command, "--file-storage-path", store, *flags], stdout=log, stderr=log)
        while seen != "ready":
            if process.poll() is not None:
                raise SystemExit(Path(log.name).read_text()[-3000:])
            time.sleep(0.05)
            stage = health(f"http://127.0.0.1:{port}/health")
            if stage and stage != seen:
                stages.setdefault(stage, round(time.monotonic() - began, 2))
                seen = stage
        process.send_signal(signal.SIGTERM)
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        misses = Path(log.name).read_text().rpartition("#cache_miss: ")[2].split()[0]
    return {"seconds": stages.pop("ready"), "user_cpu": round(usage.ru_utime, 2), "misses": int(misses), "at": stages}


def health(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return "ready"
    except urllib.error.HTTPError as error:
        return json.load(error).get("stage", "")
    except OSError:
        return ""


def import_cpu(statement: str, *, bytecode: bool) -> float:
    """User CPU-seconds of a process that only imports."""
    with tempfile.TemporaryDirectory() as empty:
        environ = os.environ | ({} if bytecode else {"PYTHONPYCACHEPREFIX": empty, "PYTHONDONTWRITEBYTECODE": "1"})
        process = subprocess.Popen([sys.executable, "-c", statement], env=environ)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        raise SystemExit(f"{statement!r} failed")
    return round(usage.ru_utime, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    told: dict[str, Any] = {"starts": {}, "imports": {}}
    for name, statement in PROCESSES.items():
        told["imports"][name] = {
            "bytecode": import_cpu(statement, bytecode=True),
            "sources": import_cpu(statement, bytecode=False),
        }
        print(f"imports of the {name}, user CPU-seconds: {told['imports'][name]}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        kinds = ["cold", *(["second"] * options.rounds), *(["traced"] * options.rounds)]
        for kind in kinds:
            if kind == "traced":
                for index in Path(folder).glob("index-*"):
                    index.unlink()
            figures = start(Path(folder), options.flags)
            told["starts"].setdefault(kind, []).append(figures)
            print(kind, figures, flush=True)
    middle = {
        kind: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "user_cpu")}
        for kind, runs in told["starts"].items()
    }
    told["ratios"] = {
        f"{kind}/second": {key: round(middle[kind][key] / middle["second"][key], 2) for key in middle[kind]}
        for kind in ("cold", "traced")
    }
    print("medians", middle, "ratios", told["ratios"])
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
