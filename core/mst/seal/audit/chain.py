"""The chain that events form: each names the one before, and checkpoints sign all so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mst.seal.audit import merkle
from mst.seal.audit.event import KEYS, VERSION, ZERO, Who, digest, line_of, make
from mst.seal.audit.key import is_signed, public_hex

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

BEGUN = "log.begun"
ACKNOWLEDGED = "log.acknowledged"
SEGMENT = "log.segment"
CHECKPOINT = "log.checkpoint"
PRUNED = "log.pruned"


class Broken(Exception):
    """A line is not what its place asks for; the text says why and quotes nothing of it."""


@dataclass
class Chain:
    """How far a chain has come.

    Attributes:
        log: random name of the chain, in hexadecimal.
        public_key: that its checkpoints are signed with.
        seq: number of the next event, and so how many there are.
        prev: SHA-256 of the last line.
        frontier: of the Merkle tree over all lines, as `mst.seal.audit.merkle` has it.
        signed: how many of the events the last checkpoint covers, itself counted.
        time: of the last event.
        checkpoint: the last one, as its line holds it.
    """

    log: str = ""
    public_key: str = ""
    seq: int = 0
    prev: str = ZERO
    frontier: list[bytes] = field(default_factory=list)
    signed: int = 0
    time: str = ""
    checkpoint: Mapping[str, Any] | None = None

    def take(self, line: bytes) -> dict[str, Any]:
        """Check the next line, without its end, go on to it, and return its event.

        Raises:
            Broken: it is not the next of this chain.
        """
        event = parsed(line)
        if event["seq"] != self.seq or event["prev"] != self.prev:
            raise Broken("it does not follow the line before")
        if event["event"] == CHECKPOINT:
            self._check(event, line)
        self._go_on(event, line)
        return event

    def begin(self, line: bytes) -> dict[str, Any]:
        """Check the first line of a file, go on from it, and return its event.

        Raises:
            Broken: no file of a log begins so.
        """
        event = parsed(line)
        facts = event["facts"]
        kind = event["event"]
        if kind in (BEGUN, ACKNOWLEDGED):
            self.log, self.public_key = str(facts.get("log")), str(facts.get("public_key"))
            self.seq, self.prev, self.frontier = 0, ZERO, []
        elif kind == SEGMENT and isinstance(facts.get("after"), dict):
            self.continue_from(facts["after"])
        else:
            raise Broken("no file of a log begins with such an event")
        return self.take(line)

    def continue_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Stand just behind a checkpoint, whose signature is checked.

        Raises:
            Broken: it is none, or not signed by the key that it names.
        """
        line = line_of(checkpoint)
        event = parsed(line)
        facts = event["facts"]
        if event["event"] != CHECKPOINT:
            raise Broken("what it names as the checkpoint before is none")
        try:
            frontier = [bytes.fromhex(each) for each in facts["frontier"]]
            self.log, self.public_key = facts["log"], facts["public_key"]
        except (KeyError, TypeError, ValueError):
            raise Broken("the checkpoint lacks a field") from None
        self.seq, self.prev, self.frontier = event["seq"], event["prev"], frontier
        self._check(event, line)
        self._go_on(event, line)

    def _check(self, event: Mapping[str, Any], line: bytes) -> None:
        """Raise Broken unless a checkpoint at this place says what is true, and is signed."""
        facts = event["facts"]
        expected = {
            "frontier": [each.hex() for each in self.frontier],
            "log": self.log,
            "public_key": self.public_key,
            "root": merkle.root(self.frontier).hex(),
            "size": self.seq,
        }
        unsigned = {name: each for name, each in facts.items() if name != "signature"}
        if unsigned != expected or self.seq.bit_count() != len(self.frontier):
            raise Broken("the checkpoint does not fit the lines before it")
        message = line_of({**event, "facts": unsigned})
        if line_of(event) != line or not is_signed(
            self.public_key, str(facts.get("signature")), message
        ):
            raise Broken("the checkpoint is not signed by the log's key")

    def _go_on(self, event: Mapping[str, Any], line: bytes) -> None:
        merkle.extend(self.frontier, self.seq, merkle.leaf(line))
        self.seq += 1
        self.prev = digest(line)
        self.time = event["time"]
        if event["event"] == CHECKPOINT:
            self.signed = self.seq
            self.checkpoint = event

    def add(self, event: Mapping[str, Any]) -> bytes:
        """Go on to an event of our own making, and return its line."""
        line = line_of(event)
        self._go_on(event, line)
        return line

    def sign(self, key: Ed25519PrivateKey, by: Who, time: str) -> dict[str, Any]:
        """Return a checkpoint over all events so far, as the next event."""
        facts: dict[str, Any] = {
            "frontier": [each.hex() for each in self.frontier],
            "log": self.log,
            "public_key": public_hex(key),
            "root": merkle.root(self.frontier).hex(),
            "size": self.seq,
        }
        event = make(CHECKPOINT, facts, self.seq, self.prev, by, time)
        signature = key.sign(line_of(event)).hex()
        return {**event, "facts": {**facts, "signature": signature}}


def parsed(line: bytes) -> dict[str, Any]:
    """Return the event on a line.

    Raises:
        Broken: none is.
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        raise Broken("it is no JSON") from None
    if not isinstance(event, dict) or event.keys() != KEYS or event["v"] != VERSION:
        raise Broken("it is no event of this version")
    texts = (event["event"], event["time"], event["prev"], event["command"])
    if not (
        isinstance(event["facts"], dict)
        and type(event["seq"]) is int
        and event["seq"] >= 0
        and all(isinstance(each, str) for each in texts)
    ):
        raise Broken("a field has another type")
    return event
