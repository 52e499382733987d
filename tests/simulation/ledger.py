"""This module holds the books kept from the events of a run, which must balance. It does not know the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.engine.events import EventKind, RequestEvent, StepEvent, WaitReason

__all__ = ["Account", "Ledger"]


@dataclass(slots=True)
class Account:
    """What the events say of one sequence."""

    num_prompt_tokens: int
    row: int = -1
    num_computed_tokens: int = 0
    num_sampled: int = 0
    num_admitted: int = 0
    num_preempted: int = 0
    end: RequestEvent | None = None


class Ledger:
    """A recorder that keeps what does not fit in `complaints`, so that whoever drives the engine may raise it."""

    def __init__(self) -> None:
        self.accounts: dict[tuple[str, int], Account] = {}
        self.complaints: list[str] = []
        self.num_steps = 0
        self.num_cached_tokens = 0
        self.num_looked_up_tokens = 0
        self.num_chunk_tokens = 0
        self._owners: dict[int, Account] = {}
        self._last_s = 0.0

    def on_request(self, event: RequestEvent) -> None:
        self._on_time(event.time_s, event)
        key = (event.request_id, event.choice)
        if event.kind == EventKind.ARRIVED:
            self._check(key not in self.accounts, event, "it has arrived before")
            self._check(event.max_tokens >= 1, event, "it may generate nothing")
            self.accounts[key] = Account(event.num_tokens)
            return
        account = self.accounts[key]
        self._check(account.end is None, event, "it has ended")
        if event.kind == EventKind.WAITS:
            self._check(account.row < 0, event, "it has a row")
            self._check(event.detail in set(WaitReason), event, "no reason")
        elif event.kind == EventKind.ADMITTED:
            self._admit(account, event)
        elif event.kind == EventKind.PREEMPTED:
            self._check(event.step == self.num_steps, event, "not before the next step")
            self._check(event.num_tokens == account.num_computed_tokens, event, f"{account} gave up its KV")
            account.num_preempted += 1
            self._leave(account, event)
        else:
            self._check(event.step == self.num_steps - 1, event, "not after the last step")
            self._check(event.num_tokens <= account.num_sampled, event, f"{account} keeps tokens it never got")
            account.end = event
            if account.row >= 0 or event.row >= 0:
                self._leave(account, event)

    def on_step(self, event: StepEvent) -> None:
        times = [event.start_s, event.execute_s, event.update_s, event.end_s]
        self._check(times == sorted(times), event, "its times are out of order")
        self._on_time(event.end_s, event)
        self._check(event.step == self.num_steps, event, f"after step {self.num_steps - 1}")
        self.num_steps += 1
        rows, counts = event.rows.tolist(), event.num_scheduled_tokens.tolist()
        self.num_chunk_tokens += sum(count for count in counts if count > 1)
        for row, count in zip(rows, counts, strict=True):
            self._check(row in self._owners, event, f"row {row} is nobody's")
            if row in self._owners:
                self._owners[row].num_computed_tokens += count
        for place in event.sampled.tolist():
            account = self._owners[rows[place]]
            account.num_sampled += 1
            known = account.num_prompt_tokens + account.num_sampled - 1
            self._check(account.num_computed_tokens == known, event, f"{account} got a token before its turn")
        self._check(not event.failed or len(event.sampled) == 0, event, "a failed step has no tokens")

    def _admit(self, account: Account, event: RequestEvent) -> None:
        self._check(event.row not in self._owners, event, "its row is taken")
        self._check(event.step == self.num_steps, event, "not in the next step")
        known = account.num_prompt_tokens + account.num_sampled
        self._check(event.num_tokens == known, event, f"{account} has another number of tokens")
        self._check(account.num_admitted == account.num_preempted, event, f"{account} has a row")
        account.num_admitted += 1
        account.row = event.row
        account.num_computed_tokens = event.num_cached_tokens
        self.num_cached_tokens += event.num_cached_tokens
        self.num_looked_up_tokens += event.num_tokens
        self._owners[event.row] = account

    def _leave(self, account: Account, event: RequestEvent) -> None:
        self._check(account.row == event.row >= 0, event, f"{account} has another row")
        self._owners.pop(event.row, None)
        account.row = -1

    def _on_time(self, time_s: float, event: object) -> None:
        # An end is told after the step in which it came about.
        if not (isinstance(event, RequestEvent) and event.kind == EventKind.FINISHED):
            self._check(time_s >= self._last_s, event, f"it comes after {self._last_s}")
            self._last_s = time_s

    def _check(self, holds: bool, event: object, what: str) -> None:
        if not holds:
            self.complaints.append(f"{what}: {event}")
