"""`python -m tools.bytecode`: compiles to bytecode what a start and the tests import, by importing it.

uv installs sources only, and where PYTHONDONTWRITEBYTECODE is set every start would compile them again: 5 CPU-seconds
of the engine process's 7. All of site-packages would take minutes (transformers holds thousands of modules).
"""

import importlib
import subprocess
import sys
from contextlib import suppress

GROUPS = (
    ("jaxserve.engine.build", "jaxserve.engine.loop", "jaxserve.engine.record", "checkpoints.convert"),
    (
        *("jaxserve.launch", "jaxserve.offline", "transformers.utils.chat_template_utils", "llguidance"),
        *("pytest", "_pytest.assertion.rewrite", "pytest_asyncio", "hypothesis", "httpx2", "openai", "anthropic"),
    ),
)


def main() -> None:
    """One process for each group; what cannot be imported is left as it is."""
    if sys.argv[1:]:
        sys.dont_write_bytecode = False
        for name in sys.argv[1:]:
            with suppress(ImportError):
                importlib.import_module(name)
        return
    started = [subprocess.Popen([sys.executable, "-m", "tools.bytecode", *group]) for group in GROUPS]
    for process in started:
        process.wait()


if __name__ == "__main__":
    main()
