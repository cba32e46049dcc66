"""A store against a model of it: any calls in any order, with crashes anywhere inside them."""

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxserve.store import ACTIVE, Batch, BatchError, Store, WrongStatus
from jaxserve.store.sqlite import SQLiteStore
from tests.stores import (
    Clock,
    Crash,
    FailingDisk,
    Faults,
    abandon,
    answer,
    check_results,
    make_batch,
    quick_store,
    spans,
)

FINAL = ("completed", "expired", "cancelled")
TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
CRASH = st.one_of(st.just(0), st.integers(1, 25))  # before which of the call's changes the process dies; 0: it lives


@dataclass(frozen=True)
class Model:
    """What a batch should be."""

    num_lines: int
    status: str = "validating"
    outcomes: tuple[str | None, ...] = ()
    times: dict[str, int] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        return self.outcomes.count(None)

    def moved(self, status: str, now: float, **changes: Any) -> "Model":
        return replace(self, status=status, times={**self.times, status: int(now)}, **changes)

    def matches(self, batch: Batch) -> bool:
        counts = tuple(self.outcomes.count(kind) for kind in ("completed", "failed", "unexecuted"))
        return (
            self.status == batch.status
            and len(self.outcomes) == batch.num_total
            and counts == (batch.num_completed, batch.num_failed, batch.num_unexecuted)
            and all(getattr(batch, f"{status}_at") == self.times.get(status) for status in TIMES)
        )


class StoreMachine(RuleBasedStateMachine):
    batches = Bundle("batches")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.clock = Clock()
        self.models: dict[str, Model] = {}
        self.open()

    def make_store(self, faults: Faults, disk: FailingDisk) -> Store:
        return quick_store(Path(self.folder.name) / "store", faults, disk, self.clock)

    def abandon(self, store: Store) -> None:
        """Its process is dead."""
        assert isinstance(store, SQLiteStore)
        abandon(store)

    def open(self) -> None:
        self.faults = Faults()
        self.disk = FailingDisk(self.faults)
        self.store = self.make_store(self.faults, self.disk)
        active = self.store.recover()
        assert {batch.id for batch in active} == {id for id, model in self.models.items() if model.status in ACTIVE}

    def attempt(self, batch_id: str, wanted: Model | None, at: int, call: Any) -> None:
        """The call happens wholly (wanted), is refused (None), or dies and has happened wholly or not at all."""
        before = self.models[batch_id]
        self.faults.mode, self.faults.at = "crash", self.faults.count + at if at else 0
        try:
            batch = call()
        except WrongStatus as refusal:
            found = refusal.batch
            assert wanted is None and before.matches(found)
        except Crash:
            self.abandon(self.store)
            self.disk.cut_power(Path(self.folder.name) / "store")
            after = [model for model in (before, wanted) if model]
            self.store = self.make_store(Faults(), FailingDisk(Faults()))
            found = self.store.get_batch(batch_id)
            (self.models[batch_id],) = [model for model in after if model.matches(found)][:1]
            self.abandon(self.store)
            self.open()
        else:
            assert wanted is not None and wanted.matches(batch), (wanted, batch)
            self.models[batch_id] = wanted
        self.faults.at = 0

    @precondition(lambda self: len(self.models) < 4)
    @rule(target=batches, num_lines=st.integers(1, 6))
    def create(self, num_lines):
        batch = make_batch(self.store, num_lines)
        self.models[batch.id] = Model(num_lines)
        return batch.id

    @rule(batch=batches, at=CRASH)
    def start(self, batch, at):
        model = self.models[batch]
        wanted = None
        if model.status == "validating":
            wanted = model.moved("in_progress", self.clock.now, outcomes=(None,) * model.num_lines)
        self.attempt(batch, wanted, at, lambda: self.store.start_batch(batch, spans(self.store, batch), model="m"))

    @rule(
        batch=batches, at=CRASH, outcomes=st.lists(st.sampled_from(["completed", "failed", "unexecuted"]), max_size=6)
    )
    def record(self, batch, at, outcomes):
        model = self.models[batch]
        rows = self.store.pending_rows(batch)[: len(outcomes)]
        results = [answer(self.store, batch, row, outcome) for row, outcome in zip(rows, outcomes, strict=False)]
        wanted = None
        if model.status in ("in_progress", "finalizing", "cancelling"):
            new = list(model.outcomes)
            for result in results:
                assert new[result.position] is None
                new[result.position] = result.outcome
            wanted = replace(model, outcomes=tuple(new))
        self.attempt(batch, wanted, at, lambda: self.store.record_results(batch, results + results[::-1]))

    @rule(batch=batches, at=CRASH)
    def cancel(self, batch, at):
        model = self.models[batch]
        wanted = None
        if model.status in ("cancelling", "cancelled"):
            wanted = model
        elif model.status in ACTIVE:
            wanted = model.moved("cancelling", self.clock.now)
        self.attempt(batch, wanted, at, lambda: self.store.cancel_batch(batch))

    @rule(batch=batches, at=CRASH)
    def finalize(self, batch, at):
        model = self.models[batch]
        wanted = None
        if model.status == "finalizing":
            wanted = model
        elif model.status == "in_progress" and not model.pending:
            wanted = model.moved("finalizing", self.clock.now)
        self.attempt(batch, wanted, at, lambda: self.store.start_finalizing(batch))

    @rule(batch=batches, at=CRASH, status=st.sampled_from(FINAL))
    def finish(self, batch, at, status):
        model = self.models[batch]
        before = {
            "completed": ("finalizing",),
            "cancelled": ("cancelling",),
            "expired": ("validating", "in_progress", "finalizing"),
        }
        wanted = None
        if model.status == status:
            wanted = model
        elif model.status in before[status] and not model.pending:
            wanted = model.moved(status, self.clock.now)
        self.attempt(batch, wanted, at, lambda: self.store.finish_batch(batch, status))

    @rule(batch=batches, at=CRASH)
    def fail(self, batch, at):
        model = self.models[batch]
        wanted = None
        if model.status == "failed":
            wanted = model
        elif model.status in ACTIVE:
            wanted = model.moved("failed", self.clock.now)
        self.attempt(batch, wanted, at, lambda: self.store.fail_batch(batch, [BatchError("code", "message")]))

    @rule(seconds=st.integers(1, 100))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def reopen(self):
        self.store.close()
        self.open()

    @invariant()
    def every_batch_is_as_it_should_be(self):
        for batch_id, model in self.models.items():
            batch = self.store.get_batch(batch_id)
            assert model.matches(batch), (model, batch)
            if batch.is_final:
                check_results(self.store, batch)

    def teardown(self):
        self.store.close()
        self.folder.cleanup()


def test_a_postgres_store_is_as_its_model_too(postgres, monkeypatch):
    """A call dies before one of its statements; others of its process have been abandoned before."""
    from jaxserve.store.postgres import PostgresStore
    from jaxserve.store.postgres.database import Session

    dying = SimpleNamespace(faults=Faults())

    class Machine(StoreMachine):
        def __init__(self) -> None:
            self.url = postgres.new_database()
            super().__init__()

        def make_store(self, faults: Faults, disk: FailingDisk) -> PostgresStore:
            dying.faults = faults
            return PostgresStore(self.url, clock=self.clock, lease_seconds=0.0)

        def abandon(self, store: Store) -> None:
            assert isinstance(store, PostgresStore)
            store._db.close()

    for name in ("one", "run", "run_many", "copy"):
        method = getattr(Session, name)

        def fail_or(self, *args, method=method):
            dying.faults.fails(grows=True)
            return method(self, *args)

        monkeypatch.setattr(Session, name, fail_or)
    options = settings(TestStoreMachine.settings, max_examples=8, stateful_step_count=25)
    run_state_machine_as_test(Machine, settings=options)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
