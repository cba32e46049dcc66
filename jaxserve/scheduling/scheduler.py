"""The scheduler: three verbs, and everything it knows about the device is counts.

    plan = scheduler.schedule(now)             # host bookkeeping -> plain, padded int32 data
    handle = runner.launch(plan)               # asynchronous
    events = scheduler.commit(plan, result)    # learns the tokens; frees what finished

and for a plan with constrained rows, before it samples and after every earlier one is committed:

    masks, events = scheduler.constrain(plan)

Step k+1 may be scheduled and launched before step k is committed. What makes that safe is that the device runs steps in
the order of their launch: a page freed while a step that writes it is in flight is rewritten by a later step only, and
a page may be shared as soon as the step that fills it is planned, from the next plan on.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.scheduling.buckets import SchedulerConfig, buckets, choose_bucket
from jaxserve.scheduling.events import EventColumns, token_logprobs
from jaxserve.scheduling.pages import PagePool
from jaxserve.scheduling.picked import Frontier, Picked
from jaxserve.scheduling.plan import EMIT, GRAMMAR, SUPPRESS_STOP, Bucket, Plan, StepPlan, StepResult
from jaxserve.scheduling.radix import RadixTree
from jaxserve.scheduling.readings import plan_readings
from jaxserve.scheduling.rows import RowTable
from jaxserve.scheduling.sequence import Sequence, order
from jaxserve.scheduling.snapshot import page_states, request_views
from jaxserve.scheduling.turns import Turn, Turns
from jaxserve.scheduling.waiting import WaitingQueue, longest_match_order
from jaxserve.types import EngineStats, FinishReason, Request, RequestView, StepEvents

if TYPE_CHECKING:
    from jaxserve.scheduling.grammar import Matcher

__all__ = ["Scheduler", "SchedulerConfig", "buckets"]


class Scheduler:
    """Owns sequences, pages, prefix tree and slots; not thread-safe, and nothing in it waits or reads a clock."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._pool = PagePool(config.num_pages)
        self._tree = RadixTree(self._pool, config.page_size) if config.radix_cache else None
        self._rows = RowTable(config)
        self._waiting = WaitingQueue()
        self._decoding: list[Sequence] = []  # both in the order of Sequence.order
        self._prefilling: list[Sequence] = []
        self._free_slots = list(range(config.max_running - 1, -1, -1))
        self._known: dict[int, Sequence] = {}
        self._num_interactive = 0  # of _known, priority <= 0
        self._interactive_at = float("-inf")  # when there was some last
        self._num_batch_running = 0  # with a slot, priority > 0
        self._num_arrived = 0
        self._turns = Turns()
        self._prompt_tokens = self._cached_tokens = self._generation_tokens = 0
        self._preemptions = self._steps = self._padding_tokens = self._step_tokens = 0

    # What comes in

    def add(self, request: Request, now: float, matcher: "Matcher | None" = None) -> None:
        """Queue a request; now in seconds of any clock, the one schedule is given. matcher: of request.grammar, at
        its start.

        Raises ValueError for an id in use and for a request that the pool could never hold, alone in it.
        """
        if request.id in self._known:
            raise ValueError(f"request id {request.id} is in use; ids must be unique until their last event")
        config = self.config
        sequence = Sequence.of(request, self._num_arrived, now, config.max_model_len, config.pooling)
        if sequence.num_prompt + sequence.answers > config.max_model_len:
            raise ValueError(
                f"prompt has {sequence.num_prompt} tokens; with one to answer, this server takes "
                f"{config.max_model_len - 1} (--max-model-len)"
            )
        tokens = max(sequence.num_prompt, sequence.max_length - 1)  # the last token sampled is never computed
        most = self._pool.num_pages * config.page_size
        if tokens > most:
            raise ValueError(
                f"prompt and max_tokens take {tokens} tokens of KV cache; it holds {most} (--max-total-tokens)"
            )
        assert (matcher is None) == (request.grammar is None), "a constrained request needs its matcher"
        sequence.matcher = matcher
        self._num_arrived += 1
        self._known[request.id] = sequence
        self._num_interactive += request.priority <= 0
        self._waiting.add(sequence)

    def abort(self, request_ids: Iterable[int], compilations: int = 0, outside: Iterable[int] = ()) -> StepEvents:
        """End these requests now; one "abort" event for each id still known, and for each of outside, which were never
        added. Tokens in flight are dropped by commit."""
        columns = EventColumns()
        for request_id in outside:
            columns.add_abort(request_id)
        for request_id in request_ids:
            sequence = self._known.get(request_id)
            if sequence is not None:
                self._end(sequence)
                columns.add(sequence, None, "abort", None)
        return columns.events(self.stats(compilations))

    def flush_cache(self) -> None:
        """Drop every prefix that no running sequence holds."""
        if self._tree is not None:
            self._tree.evict(self._pool.num_cached)

    @property
    def has_work(self) -> bool:
        return bool(self._known)

    @property
    def num_open(self) -> int:
        return len(self._known)

    def knows(self, request_id: int) -> bool:
        return request_id in self._known

    def num_cached_pages_of(self, request: Request) -> int:
        """Pages of a request's prompt that are in the prefix tree now."""
        return 0 if self._tree is None else self._tree.depth_of(request.token_ids, request.namespace)

    # Choosing the rows of a step

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None when nothing can be computed before another commit or add."""
        picked = self.begin(self.is_capped(now))
        for turn in self._turns.order(self.config.mixed, self.interactive):
            if self.pick(picked, turn, now):
                self._turns.took(sequence for sequence, _ in picked.chunks)
                return self.plan(picked, choose_bucket(self.config, *picked.size))
        return None

    @property
    def interactive(self) -> tuple[bool, bool]:
        """Whether somebody interactive waits for a prefill, and for the next token."""
        prompts = [*self._waiting.priorities()[:1], *(sequence.order[0] for sequence in self._prefilling[:1])]
        rows = [sequence.order[0] for sequence in self._decoding[:1]]
        return min(prompts, default=1) <= 0, min(rows, default=1) <= 0

    def is_capped(self, now: float) -> bool:
        """Whether batch work keeps to its limits in a step at that time."""
        if self._num_interactive:
            self._interactive_at = now
        return self._num_interactive > 0 or now - self._interactive_at < self.config.batch_linger

    def begin(self, capped: bool) -> Picked:
        return Picked(self.config, self._frontier(), capped)

    def pick(self, picked: Picked, turn: Turn, now: float) -> bool:
        """Choose rows of the given kinds; False when there are none."""
        if turn != "prefill":
            self._pick_decode(picked)
        if turn != "decode":
            self._pick_chunks(picked, now)
        return bool(picked.decode or picked.chunks)

    def _pick_decode(self, picked: Picked) -> None:
        """One token for each sequence that has one to compute, oldest first, so that no victim was chosen before."""
        index, page_size = 0, self.config.page_size
        decoding, chosen = self._decoding, picked.decode
        while index < len(decoding):  # shrinks from its end while we walk
            sequence = decoding[index]
            index += 1
            if len(sequence.tokens) + sequence.num_in_flight >= sequence.max_length:
                continue  # its last token is in flight
            if sequence.order[0] > 0:
                if picked.batch_rows_left <= 0:
                    break
                picked.batch_rows_left -= 1
            if sequence.num_computed < len(sequence.pages) * page_size or self._grow(sequence, picked):
                chosen.append(sequence)

    def _pick_chunks(self, picked: Picked, now: float) -> None:
        """Chunks of admitted prompts and of new ones, by priority, until tokens, rows, slots or pages run out."""
        priorities = {sequence.order[0] for sequence in self._prefilling} | set(self._waiting.priorities())
        for priority in sorted(priorities):
            if priority > 0 and picked.chunks:
                picked.keep_bucket()
            for sequence in [s for s in self._prefilling if s.order[0] == priority]:
                if not picked.has_room(priority):
                    break
                picked.add_chunk(sequence)
            if not self._admit_all(priority, picked, now):
                break
        picked.drop_preempted()

    def _admit_all(self, priority: int, picked: Picked, now: float) -> bool:
        """Admit of this priority what fits. False: someone waits for slots or pages, and nobody may overtake him."""
        if not self._can_admit(priority) or (priority > 0 and not picked.capped and self._gathers(priority)):
            return False
        for sequence in self._waiting.returning(priority):
            if sequence.num_in_flight or sequence in picked.preempted:
                return False  # comes back once its token is read; its pages are kept for it
            if not self._has_room_for_new(priority, picked):
                return True
            if not self._admit(sequence, picked):
                return False
        if not self._has_room_for_new(priority, picked):
            return True
        for sequence in self._admission_order(priority, now):
            if not self._has_room_for_new(priority, picked):
                return True
            if not self._waits_for_prefix(sequence, picked) and not self._admit(sequence, picked):
                return False
        return True

    def _can_admit(self, priority: int) -> bool:
        """False where none of this priority could get in: spares a full server looking at the whole queue."""
        victim = self._youngest()
        if victim is None or victim.order[0] > priority:
            return True
        running = len(self._decoding) + len(self._prefilling)
        return bool(self._free_slots) and self._pool.num_available > running

    def _gathers(self, priority: int) -> bool:
        """Batch work by itself lets a few slots wait for a full chunk, where prefills and decodes take turns: a padded
        token costs what a real one does, and so does a step."""
        slots = len(self._free_slots)
        if self.config.mixed or self._prefilling or not self._decoding or slots > self.config.max_running // 8:
            return False
        return self._waiting.fills_less(priority, slots, self.config.chunk_size)

    def _has_room_for_new(self, priority: int, picked: Picked) -> bool:
        cap = self.config.max_batch_running
        if priority > 0 and cap is not None and picked.capped and self._num_batch_running >= cap:
            return False
        return picked.has_room(priority)

    def _admission_order(self, priority: int, now: float) -> list[Sequence]:
        window = self._waiting.oldest(priority, self.config.lpm_window)
        if self.config.policy == "fcfs" or self._tree is None or len(window) < 2:
            return window
        return longest_match_order(window, self._num_matched, now - self.config.lpm_patience)

    def _num_matched(self, sequence: Sequence) -> int:
        """Whole pages of a waiting sequence that are in the tree now. Starts at the last answer, so asking is cheap."""
        if self._tree is None:
            return 0
        depth = sequence.max_match // self.config.page_size
        node = self._tree.find(sequence.tokens, sequence.request.namespace, depth, sequence.node)
        sequence.node = node
        return node.depth

    def _frontier(self) -> Frontier:
        """The page that each running prefill computes next, as its place in the tree."""
        frontier: Frontier = {}
        for sequence in self._prefilling:
            self._add_to_frontier(frontier, sequence)
        return frontier

    def _add_to_frontier(self, frontier: Frontier, sequence: Sequence) -> None:
        index, node = sequence.num_computed // self.config.page_size, sequence.node
        if self._tree is None or node is None or node.depth != index:
            return  # it computes what the tree already has in another page
        place = (node, self._tree.key(sequence.tokens, sequence.request.namespace, index))
        frontier[place] = min(sequence.order[0], frontier.get(place, sequence.order[0]))

    def _waits_for_prefix(self, sequence: Sequence, picked: Picked) -> bool:
        """True when the next page it would compute is being computed by another of its priority or a smaller one."""
        if self._tree is None or not picked.frontier:
            return False
        matched = self._num_matched(sequence)
        if (matched + 1) * self.config.page_size > sequence.max_match:
            return False
        place = (sequence.node, self._tree.key(sequence.tokens, sequence.request.namespace, matched))
        return picked.frontier.get(place, sequence.order[0] + 1) <= sequence.order[0]

    # Slots and pages

    def _admit(self, sequence: Sequence, picked: Picked) -> bool:
        """Give sequence a slot, its cached prefix and pages for all its known tokens; its first chunk joins the
        step."""
        while not self._reserve(sequence):
            victim = self._youngest()
            if victim is None or victim.order[0] <= sequence.order[0]:
                return False
            self._preempt(victim, picked)
        self._waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.num_to_prefill = len(sequence.tokens)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached = sequence.num_computed
            self._prompt_tokens += sequence.num_prompt
            self._cached_tokens += sequence.num_cached
        insort(self._prefilling, sequence, key=order)
        self._num_batch_running += sequence.order[0] > 0
        self._rows.assign(sequence, sequence.num_computed // self.config.page_size)
        picked.admitted.append(sequence)
        self._add_to_frontier(picked.frontier, sequence)
        picked.add_chunk(sequence)
        return True

    def _reserve(self, sequence: Sequence) -> bool:
        """Pages for all known tokens of a waiting sequence, those of its cached prefix shared; nothing changes if not.

        One page for each running row is left over, so that the very next steps need not preempt what this one admits.
        """
        total = -(-len(sequence.tokens) // self.config.page_size)
        wanted = total + len(self._decoding) + len(self._prefilling)
        if not self._free_slots or wanted - self._num_matched(sequence) > self._pool.num_available:
            return False
        matched = self._tree.pages(sequence.node) if self._tree is not None and sequence.node is not None else []
        self._pool.hold(matched)  # those that were cached are no longer available
        if wanted - len(matched) > self._pool.num_available:
            self._pool.release(matched)
            return False
        sequence.pages = matched + self._take(total - len(matched))
        sequence.num_computed = len(matched) * self.config.page_size
        return True

    def _take(self, count: int) -> list[int]:
        """count pages, at most as many as are available."""
        if count > self._pool.num_free and self._tree is not None:
            self._tree.evict(count - self._pool.num_free)
        return self._pool.take(count)

    def _grow(self, sequence: Sequence, picked: Picked) -> bool:
        """One more page for a decoding sequence. False: it was the youngest itself and gave way."""
        while not self._pool.num_available:
            victim = self._youngest()
            assert victim is not None
            self._preempt(victim, picked)
            if victim is sequence:
                return False
        sequence.pages += self._take(1)
        self._rows.show_pages(sequence, len(sequence.pages) - 1, len(sequence.pages))
        return True

    def _youngest(self) -> Sequence | None:
        """The running sequence to preempt: the last arrived of the lowest priority."""
        last = [part[-1] for part in (self._decoding, self._prefilling) if part]
        return max(last, key=order, default=None)

    def _preempt(self, sequence: Sequence, picked: Picked) -> None:
        self._release(sequence)
        self._waiting.add(sequence)
        picked.preempted.append(sequence)
        self._preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Take slot and pages from a running sequence; its full pages of known tokens stay in the tree."""
        (self._prefilling if sequence.is_prefilling else self._decoding).remove(sequence)
        self._num_batch_running -= sequence.order[0] > 0
        if self._tree is not None:
            known = min(sequence.num_computed, len(sequence.tokens)) // self.config.page_size
            self._enter_tree(sequence, known, passing=True)
        self._rows.clear(sequence)
        self._pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.slot, sequence.pages, sequence.num_computed, sequence.num_to_prefill = -1, [], 0, 0

    def _enter_tree(self, sequence: Sequence, depth: int, passing: bool) -> None:
        if self._tree is not None:
            start, namespace = sequence.node or self._tree.root, sequence.request.namespace
            sequence.node = self._tree.insert(start, sequence.tokens, namespace, sequence.pages, depth, passing)

    def plan(self, picked: Picked, bucket: Bucket) -> StepPlan:
        """Write the step, then let its prompt pages into the tree: later plans run after it."""
        num_cached = sum(sequence.num_computed for sequence in picked.admitted)
        plan = self._rows.write(picked.decode, picked.chunks, bucket)
        for sequence, _ in picked.chunks:
            self._enter_tree(sequence, sequence.num_computed // self.config.page_size, passing=False)
            if not sequence.is_prefilling:
                self._prefilling.remove(sequence)
                insort(self._decoding, sequence, key=order)
        self._steps += 1
        self._step_tokens += plan.num_tokens
        self._padding_tokens += plan.bucket.num_tokens - plan.num_tokens
        return replace(
            plan,
            admissions=picked.admissions(),
            readings=plan_readings(plan),
            preempted=tuple(s.request.id for s in picked.preempted),
            num_new_sequences=len(picked.admitted),
            num_cached_tokens=num_cached,
        )

    # What comes back

    def commit(self, plan: Plan, result: StepResult, compilations: int = 0) -> StepEvents:
        """Read the tokens of a step, in the order of schedule; rows of ended sequences are dropped."""
        (plan,) = plan.parts
        flags, counts, tokens = plan.arrays.flags.tolist(), result.num_tokens.tolist(), result.token_ids.tolist()
        columns = EventColumns()
        for row, sequence in plan.sequences:
            if not flags[row] & EMIT:
                self._commit_end(sequence, int(plan.arrays.kv_lens[row]), columns)
                continue
            sequence.num_in_flight -= 1
            for n, token in enumerate(tokens[row][: counts[row]]):
                if sequence.done:
                    break
                reason = self._append(sequence, token)
                count = sequence.request.params.num_logprobs
                columns.add(sequence, token, reason, None if count is None else token_logprobs(result, row, n, count))
                if reason is None and sequence.matcher is not None and sequence.matcher.is_over:
                    self._end_with(sequence, sequence.matcher.ending, columns)
        return columns.events(self.stats(compilations))

    def constrain(self, plan: Plan, compilations: int = 0) -> tuple[np.ndarray, StepEvents]:
        """A constrained plan, every earlier one being committed -> masks [S + R, words] for its handle, and the ends of
        the rows that nothing can follow."""
        (plan,) = plan.parts
        columns = EventColumns()
        flags = plan.arrays.flags.tolist()
        rows = [(row, s, s.matcher) for row, s in plan.sequences if flags[row] & GRAMMAR and s.matcher is not None]
        alive = [(matcher, row) for row, sequence, matcher in rows if not sequence.done]
        vocabulary = rows[0][2].vocabulary
        masks = vocabulary.fill(alive, plan.bucket.num_rows)
        for row, sequence, matcher in rows:
            if sequence.done:
                continue
            never = vocabulary.eos_token_ids - sequence.stop_token_ids  # ignore_eos
            if flags[row] & SUPPRESS_STOP:
                never |= sequence.stop_token_ids
            if matcher.failed or not vocabulary.forbid(masks[row], never):
                masks[row] = -1
                self._end_with(sequence, matcher.ending, columns)
        return masks, columns.events(self.stats(compilations))

    def _commit_end(self, sequence: Sequence, computed: int, columns: EventColumns) -> None:
        """A step without a token for this sequence was read: the end of one that answers with none?"""
        if sequence.answers or computed < sequence.num_prompt:
            return
        sequence.num_in_flight -= 1
        if not sequence.done:
            self._end(sequence)
            columns.add(sequence, None, "stop" if sequence.request.task == "embed" else "length", None)

    def _append(self, sequence: Sequence, token: int) -> FinishReason | None:
        reason = sequence.append(token)
        self._generation_tokens += 1
        if reason is not None:
            self._end(sequence)
        return reason

    def _end_with(self, sequence: Sequence, reason: FinishReason, columns: EventColumns) -> None:
        """An end without a token."""
        self._end(sequence)
        columns.add(sequence, None, reason, None)

    def _end(self, sequence: Sequence) -> None:
        """The request is over, wherever it is."""
        sequence.done = True
        del self._known[sequence.request.id]
        self._num_interactive -= sequence.order[0] <= 0
        if sequence.slot >= 0:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.node = None

    def stats(self, compilations: int = 0) -> EngineStats:
        """Counts as of now; compilations is the engine's own count since ready."""
        return EngineStats(
            num_running=len(self._decoding) + len(self._prefilling),
            num_waiting=len(self._waiting),
            num_pages=self._pool.num_pages,
            num_held_pages=self._pool.num_held,
            num_cached_pages=self._pool.num_cached,
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=self._cached_tokens,
            generation_tokens_total=self._generation_tokens,
            preemptions_total=self._preemptions,
            steps_total=self._steps,
            padding_tokens_total=self._padding_tokens,
            step_tokens_total=self._step_tokens,
            compilations_total=compilations,
        )

    def snapshot(self) -> tuple[tuple[RequestView, ...], bytes]:
        """-> requests and the state of each page, for people who watch (scheduling.snapshot)."""
        views = request_views(self._decoding, self._prefilling, self._waiting)
        return views, page_states(self._pool, self._decoding + self._prefilling)

    def check_invariants(self) -> None:
        """For tests, after any verb: AssertionError unless pages, slots, queues and the tree account for everything."""
        running = self._decoding + self._prefilling
        assert sorted(self._decoding, key=order) == self._decoding
        assert sorted(self._prefilling, key=order) == self._prefilling
        waiting = list(self._waiting)
        assert len(waiting) == len(self._waiting)
        assert {s.request.id for s in running + waiting} == set(self._known)
        assert len(running) + len(waiting) == len(self._known)
        assert self._num_interactive == sum(s.order[0] <= 0 for s in running + waiting)
        assert self._num_batch_running == sum(s.order[0] > 0 for s in running)
        assert all(not s.pages and s.slot == -1 and not s.done for s in waiting)
        slots = [s.slot for s in running] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_running)), "a slot is lost or doubled"
        self._rows.check_invariants(running, self._free_slots, self._pool)
        self._pool.check_invariants([page for s in running for page in s.pages])
        if self._tree is not None:
            self._tree.check_invariants()
