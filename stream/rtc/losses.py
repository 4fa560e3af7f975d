"""The packets that have not come: when each is asked for, and how long the answer takes (RFC 4585 §6.2.1)."""

from __future__ import annotations

from dataclasses import dataclass

ROUND_S = 0.030  # the shortest time between two requests for the same packet
LIMIT = 128  # with more packets missing than this a keyframe costs less than all of them
TRIES = 10  # requests for one packet, as in libwebrtc
MEMORY = 1024  # packets behind the head whose late coming still tells something


@dataclass(slots=True)
class Loss:
    """A packet that has not come."""

    noticed: float  # s
    asked: float = float("-inf")  # s
    tries: int = 0


class Losses:
    """What is missing from the head of the stream on. `round_s` is how long a retransmission takes, with a margin.

    Sequence numbers are counted on beyond 16 bits. Time is an argument, in seconds.
    """

    def __init__(self, longest_s: float) -> None:
        self.round_s = ROUND_S
        self.asked = 0  # packets asked for, each time counted
        self._longest_s = longest_s
        self._rtt_s = 0.0
        self._head = 0
        self._losses: dict[int, Loss] = {}

    def lose(self, first: int, end: int, now: float) -> None:
        """The packets [first, end) are noticed to be missing."""
        self._losses.update({seq: Loss(now) for seq in range(first, end)})

    def find(self, seq: int, now: float) -> bool:
        """A packet has come; whether it had been missing."""
        loss = self._losses.pop(seq, None)
        if loss and loss.tries:
            # Up at once, down slowly: too long an estimate costs a little time, too short a one costs bandwidth.
            took = now - loss.noticed
            self._rtt_s = max(took, self._rtt_s + (took - self._rtt_s) / 8)
            self.round_s = min(max(1.5 * self._rtt_s, ROUND_S), self._longest_s)
        return loss is not None

    def move(self, head: int) -> None:
        """What comes before `head` is no longer wanted."""
        self._head = head
        for seq in [seq for seq in self._losses if seq < head - MEMORY]:
            del self._losses[seq]

    def clear(self) -> None:
        """The stream starts anew."""
        self._losses.clear()

    def wanted(self) -> dict[int, Loss]:
        """What is missing from the head on."""
        return {seq: loss for seq, loss in self._losses.items() if seq >= self._head} if self._losses else {}

    def since(self) -> float | None:
        """When the first of them was noticed, s."""
        wanted = self.wanted()
        return wanted[min(wanted)].noticed if wanted else None

    def ask(self, now: float) -> list[int]:
        """The sequence numbers to ask for now, ascending as 16-bit numbers."""
        wanted = self.wanted()
        if len(wanted) > LIMIT:
            return []
        due = [seq for seq, loss in wanted.items() if loss.asked + self.round_s <= now and loss.tries < TRIES]
        for seq in due:
            wanted[seq].asked = now
            wanted[seq].tries += 1
        self.asked += len(due)
        return sorted(seq & 0xFFFF for seq in due)

    def times(self) -> list[float]:
        """When something is to be asked for again, s."""
        return [loss.asked + self.round_s for loss in self.wanted().values() if loss.tries < TRIES]
