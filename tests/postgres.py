"""A PostgreSQL server for tests: Debian's binaries, a folder of its own, a socket and no port."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Self
from urllib.parse import quote

import psycopg


def binaries() -> Path | None:
    """The folder of initdb and postgres; None where they are not installed."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


class PostgresServer:
    """A context manager. It never runs as root: then as the package's own user, or nobody."""

    def __init__(self, folder: Path) -> None:
        self.binaries = folder
        self.root = Path(tempfile.mkdtemp(prefix="jaxserve-pg-"))
        self.num_databases = 0
        self.user: str | None = None
        if os.geteuid() == 0:
            known = {entry.pw_name for entry in pwd.getpwall()}
            self.user = "postgres" if "postgres" in known else "nobody"
            shutil.chown(self.root, self.user)

    def __enter__(self) -> Self:
        data, log = self.root / "data", open(self.root / "log", "wb")
        initdb = [self.binaries / "initdb", "-D", data, "-U", "test", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(initdb, check=True, stdout=log, stderr=log, user=self.user, cwd=self.root)
        quick = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=60", "-c", "shared_buffers=32MB"]
        serve = [self.binaries / "postgres", "-D", data, "-k", self.root, *quick]
        self.process = subprocess.Popen(serve, stdout=log, stderr=log, user=self.user, cwd=self.root)
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
                return self
            except psycopg.OperationalError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.root / "log").read_text()) from None
                time.sleep(0.05)

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)  # waits for its clients
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def url(self, database: str) -> str:
        return f"postgresql://test@/{database}?host={quote(str(self.root), safe='')}"

    def new_database(self) -> str:
        """Its address."""
        self.num_databases += 1
        name = f"test{self.num_databases}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)
