"""`jaxserve batch`: a file of requests answered without a server, by the code that runs the server's batches.

A folder beside the output, NAME.journal, is a store of its own; it holds what is done until the output is written, so
the same command goes on after Ctrl-C, a crash or a reboot.
"""

import asyncio
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import orjson
from tqdm import tqdm

from jaxserve.api.batch_lines import check_input, same_url
from jaxserve.api.batch_worker import ANSWERS, BatchWorker
from jaxserve.api.http import MEBIBYTE
from jaxserve.api.metrics import Metrics
from jaxserve.api.serving import Serving
from jaxserve.batch_flags import Job
from jaxserve.client import EngineClient
from jaxserve.config import ServerConfig
from jaxserve.launch import EngineEntry, configure_logging, run, with_environment
from jaxserve.service import recovered_store
from jaxserve.store import Batch, BatchError, Store, StoreError

log = logging.getLogger(__name__)

WINDOW = 10 * 365 * 86_400  # seconds: nobody waits for an offline job but the one who started it
POLL_SECONDS = 0.2
PIECE = 1 << 20
MAX_SHOWN_ERRORS = 10
INTERRUPTED = 130  # the shell's exit code for Ctrl-C


class JobError(Exception):
    """What the user can mend; the message says how."""


def answer(job: Job, engine: EngineEntry | None = None) -> int:
    """The process's exit code. engine: what the child runs (tests bring their own)."""
    config = with_environment(job.options, os.environ)
    if "log_level" not in job.options.engine:  # it was not asked for
        config = replace(config, log_level="warning")
    configure_logging(config)
    for warning in job.options.warnings:
        log.warning("%s", warning)
    if job.options.server.store is not None:
        log.error("--store is for servers; a job keeps its journal beside its output")
        return 2
    engine_options = {"log_level": config.log_level, **job.options.engine}
    try:
        return _run(replace(job, options=replace(job.options, server=config, engine=engine_options)), engine)
    except (JobError, StoreError, OSError) as error:
        log.error("%s", error)
        return 2


def _run(job: Job, engine: EngineEntry | None) -> int:
    with ExitStack() as cleanup:
        if job.journal is not None:
            folder = job.journal
        else:
            folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="jaxserve-batch-")))
        _check_paths(job)
        store = recovered_store(str(folder))
        cleanup.callback(store.close)
        try:
            batch = _take_up(store, job)
        except JobError:
            if not store.list_batches(limit=1).items:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if not batch.is_final:
            service = BatchService(job.options.server, store, batch)
            code = run(job.options, service, engine)
            batch = store.get_batch(batch.id)
            if not batch.is_final:
                return _interrupted(job, batch, code)
        if batch.status != "completed":
            _show_errors(batch.errors)
            code = 2 if batch.errors and batch.in_progress_at is None else 1
        else:
            _write_results(store, batch, job)
            code = 0
        if job.journal is not None:
            shutil.rmtree(job.journal, ignore_errors=True)
        return code


def _check_paths(job: Job) -> None:
    """Raises OSError, JobError before anything is made."""
    if job.input != "-":
        open(job.input, "rb").close()
    outputs = [path for path in (job.output, job.error_file) if path not in (None, "-")]
    for path in outputs:
        if not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder of {path} does not exist; make it first")
        if os.path.isdir(path):
            raise IsADirectoryError(f"{path} is a folder; name a file in it")
        if not os.access(path if os.path.exists(path) else Path(path).absolute().parent, os.W_OK):
            raise PermissionError(f"{path} may not be written; choose another")
        if job.input != "-" and os.path.exists(path) and os.path.samefile(path, job.input):
            raise JobError(f"{path} is the input itself; choose another output")
    if job.error_file == job.output or len({os.path.realpath(path) for path in outputs}) < len(outputs):
        raise JobError(f"--error-file is the output, {job.output}; without --error-file both go there")


def _take_up(store: Store, job: Job) -> Batch:
    """The batch of this input: the one that an earlier run left, or a new one.

    Raises JobError when the journal is of another input, OSError, StoreError.
    """
    with ExitStack() as cleanup:
        source = sys.stdin.buffer if job.input == "-" else cleanup.enter_context(open(job.input, "rb"))
        upload = cleanup.enter_context(store.start_upload("input.jsonl", "batch"))
        digest, first = hashlib.sha256(), b""
        while piece := source.read(PIECE):
            first = first or piece
            digest.update(piece)
            upload.write(piece)
        for batch in store.list_batches(limit=1).items:
            if batch.status == "failed":
                break
            if (batch.metadata or {}).get("sha256") == digest.hexdigest():
                return batch
            message = f"{job.journal} is of another input; delete it to start over, or choose another output"
            raise JobError(message)
        endpoint = job.endpoint or _endpoint_of(first)
        file = upload.commit()
    _check_lines(store, file.id, endpoint, job.options.server)
    batch = store.create_batch(
        endpoint=endpoint,
        input_file_id=file.id,
        expires_after=WINDOW,
        metadata={"sha256": digest.hexdigest()},
    )
    store.delete_file(file.id)  # the batch has its snapshot
    return batch


def _check_lines(store: Store, file_id: str, endpoint: str, config: ServerConfig) -> None:
    """What can be wrong whatever the model is, before one is loaded. Raises JobError."""
    limit = config.max_body_size * MEBIBYTE
    with store.open_file(file_id) as file:
        errors = check_input(file, endpoint, serves=lambda name: True, max_line_bytes=limit).errors
    if errors:
        _show_errors(errors)
        raise JobError("nothing was run, because of these errors")


def _endpoint_of(start: bytes) -> str:
    """What the first request names. Raises JobError."""
    line = next((line for line in start.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()), b"")
    try:
        url = orjson.loads(line)["url"]
        return next(endpoint for endpoint in ANSWERS if same_url(url, endpoint))
    except (orjson.JSONDecodeError, LookupError, TypeError, AttributeError, StopIteration):
        allowed = ", ".join(ANSWERS)
        message = f"the first line of the input names no supported endpoint as its url; supported are {allowed}"
        raise JobError(message) from None


class BatchService:
    """Implements `service.Service`: works on one batch until it has ended, and shows how far it is."""

    def __init__(self, config: ServerConfig, store: Store, batch: Batch) -> None:
        self.config, self.store, self.batch = config, store, batch
        self.ready, self.ended = asyncio.Event(), asyncio.Event()

    def attach(self, client: EngineClient) -> Serving:
        self.client = client
        self.serving = Serving(client, self.config, Metrics(client, self.config.served_model_names[0]))
        self.worker = BatchWorker(self.serving, self.store, concurrency=self.config.batch_concurrency)
        return self.serving

    async def run(self) -> int:
        try:
            await self.ready.wait()
            self.worker.start()
            await self._show_progress()
        finally:
            self.ended.set()
        return 0

    def on_ready(self, seconds: float) -> None:
        self.ready.set()

    async def stop(self, grace: float) -> None:
        """What runs is not waited for: it is run again by the next command."""
        self.ready.set()
        await self.worker.stop()
        await self.ended.wait()

    def hurry(self) -> None:
        """There is nothing to hurry: stop() does not wait."""

    async def _show_progress(self) -> None:
        started = time.monotonic()
        with tqdm(unit=" requests", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:
            while not self.batch.is_final and not self.serving.stopping:
                await asyncio.sleep(POLL_SECONDS)
                self.batch = self._latest()
                done = self.batch.num_total - self.batch.num_pending
                if bar.total is None and self.batch.num_total:
                    bar.initial = bar.n = done  # by an earlier run: it says nothing of this one's pace
                    bar.total = self.batch.num_total
                if self.client.stats is not None:
                    rate = self.client.stats.generation_tokens_total / (time.monotonic() - started)
                    bar.set_postfix_str(f"{rate:.0f} tokens/s, {self.batch.num_failed} failed", refresh=False)
                bar.n = done
                bar.refresh()
                stopped = self.worker.idle and not self.serving.stopping
                if stopped and not self._latest().is_final:
                    raise StoreError("the work has stopped; the log above says why")

    def _latest(self) -> Batch:
        return self.worker.batches[0] if self.worker.batches else self.store.get_batch(self.batch.id)


def _interrupted(job: Job, batch: Batch, code: int) -> int:
    done, total = batch.num_total - batch.num_pending, batch.num_total or "?"
    again = "its journal was removed" if job.journal is None else "the same command goes on from there"
    print(f"interrupted with {done} of {total} requests done; {again}", file=sys.stderr)
    return code or INTERRUPTED


def _show_errors(errors: Sequence[BatchError]) -> None:
    for error in errors[:MAX_SHOWN_ERRORS]:
        where = "" if error.line is None else f"line {error.line}: "
        print(f"jaxserve batch: {where}{error.message} ({error.code})", file=sys.stderr)
    if len(errors) > MAX_SHOWN_ERRORS:
        print(f"jaxserve batch: and {len(errors) - MAX_SHOWN_ERRORS} more errors", file=sys.stderr)
    if any(error.code == "model_not_found" for error in errors):
        print("Give the names that the lines use with --served-model-name, or --allow-any-model.", file=sys.stderr)


def _write_results(store: Store, batch: Batch, job: Job) -> None:
    parts = [batch.output_file_id, batch.error_file_id]
    if job.error_file is not None:
        _write(store, [parts.pop()], job.error_file)
    _write(store, parts, job.output)
    counts = f"{batch.num_completed} requests completed, {batch.num_failed} failed"
    print(f"{counts}; {batch.usage.input_tokens} tokens read, {batch.usage.output_tokens} written", file=sys.stderr)


def _write(store: Store, file_ids: list[str | None], path: str) -> None:
    """The files one after the other, whole or not at all where the path is a file's."""
    if path == "-":
        _copy(store, file_ids, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device
        with open(path, "wb") as out:
            _copy(store, file_ids, out)
        return
    target = Path(os.path.realpath(path))
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as out:
        try:
            _copy(store, file_ids, out)
            out.flush()
            os.fsync(out.fileno())
            os.chmod(out.name, 0o666 & ~_umask())
            os.replace(out.name, target)
        except BaseException:
            os.unlink(out.name)
            raise


def _copy(store: Store, file_ids: list[str | None], out: IO[bytes]) -> None:
    for file_id in file_ids:
        if file_id is not None:
            with store.open_file(file_id) as file:
                shutil.copyfileobj(file, out, PIECE)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
