"""This module holds the books kept from the events of a run, which must balance. It does not know the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.engine.events import EventKind, Moment, RequestEvent, StepEvent, WaitReason

__all__ = ["Account", "Ledger"]


@dataclass(slots=True)
class Account:
    """What the events say of one sequence."""

    num_prompt_tokens: int
    row: int = -1
    num_sampled: int = 0
    num_admitted: int = 0
    num_preempted: int = 0
    end: RequestEvent | None = None


@dataclass(slots=True, eq=False)
class Stay:
    """A time with a row: steps [first_step, end_step)."""

    account: Account
    first_step: int
    num_computed_tokens: int
    end_step: int | None = None
    left: RequestEvent | None = None


class Ledger:
    """A recorder that keeps what does not fit in `complaints`, so that whoever drives the engine may raise it.

    Args:
        max_steps_in_flight: the scheduler's.
    """

    def __init__(self, max_steps_in_flight: int = 1) -> None:
        self._num_ahead = max_steps_in_flight - 1
        self.num_wasted_tokens = 0
        self.accounts: dict[tuple[str, int], Account] = {}
        self.complaints: list[str] = []
        self.num_steps = 0
        self.num_cached_tokens = 0
        self.num_looked_up_tokens = 0
        self.num_chunk_tokens = 0
        self._stays: dict[int, list[Stay]] = {}
        """By row, the latest."""
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
            self._check(0 <= event.step - self.num_steps <= self._num_ahead, event, "not before the next step")
            account.num_preempted += 1
            self._leave(account, event)
        else:
            num_ahead = 0 if event.moment == Moment.UPDATE else self._num_ahead + (event.moment != Moment.BETWEEN)
            self._check(0 <= event.step - self.num_steps + 1 <= num_ahead, event, "not after the last step")
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
        self.num_wasted_tokens += event.num_wasted_tokens
        owners = [self._owner(row, event) for row in rows]
        for stay, count in zip(owners, counts, strict=True):
            if stay is not None:
                stay.num_computed_tokens += count
        for place in event.sampled.tolist():
            stay = owners[place]
            self._check(stay is not None, event, f"row {rows[place]} got a token and is nobody's")
            if stay is not None:
                account = stay.account
                account.num_sampled += 1
                known = account.num_prompt_tokens + account.num_sampled - 1
                self._check(stay.num_computed_tokens == known, event, f"{account} got a token before its turn")
                self._check(stay.left is None or stay.left.step > event.step, event, f"{account} had left")
        for stays in self._stays.values():
            for stay in stays:
                if stay.left is not None and stay.left.kind == EventKind.PREEMPTED and stay.end_step == event.step + 1:
                    same = stay.num_computed_tokens == stay.left.num_tokens
                    self._check(same, stay.left, f"{stay} gave up its KV")
        self._check(not event.failed or len(event.sampled) == 0, event, "a failed step has no tokens")

    def _admit(self, account: Account, event: RequestEvent) -> None:
        stays = self._stays.setdefault(event.row, [])
        self._check(not stays or stays[-1].end_step is not None, event, "its row is taken")
        self._check(0 <= event.step - self.num_steps <= self._num_ahead, event, "not in the next step")
        known = account.num_prompt_tokens + account.num_sampled
        self._check(event.num_tokens == known, event, f"{account} has another number of tokens")
        self._check(account.num_admitted == account.num_preempted, event, f"{account} has a row")
        account.num_admitted += 1
        account.row = event.row
        self.num_cached_tokens += event.num_cached_tokens
        self.num_looked_up_tokens += event.num_tokens
        stays.append(Stay(account, event.step, event.num_cached_tokens))
        del stays[:-4]

    def _leave(self, account: Account, event: RequestEvent) -> None:
        self._check(account.row == event.row >= 0, event, f"{account} has another row")
        stay = self._stays[event.row][-1]
        stay.left, stay.end_step = event, event.step + (event.kind == EventKind.FINISHED)
        account.row = -1

    def _owner(self, row: int, event: StepEvent) -> Stay | None:
        """Return who had a row in a step; a row that ends with one may run in vain in the next."""
        stays = [stay for stay in self._stays.get(row, ()) if stay.first_step <= event.step]
        if not stays or stays[-1].end_step is None or event.step < stays[-1].end_step:
            self._check(len(stays) > 0, event, f"row {row} is nobody's")
            return stays[-1] if stays else None
        in_vain = self._num_ahead and event.step == stays[-1].end_step
        self._check(in_vain, event, f"row {row} is nobody's any more")
        return None

    def _on_time(self, time_s: float, event: object) -> None:
        # An end is told after the step in which it came about.
        if not (isinstance(event, RequestEvent) and event.kind == EventKind.FINISHED):
            self._check(time_s >= self._last_s, event, f"it comes after {self._last_s}")
            self._last_s = time_s

    def _check(self, holds: bool, event: object, what: str) -> None:
        if not holds:
            self.complaints.append(f"{what}: {event}")
