"""Collectives of ranks that come and go."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import ipaddress
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torchft.process_group import ProcessGroupGloo

from lgc.comm.replicas import require_agreement
from lgc.comm.traffic import SETUP, Wire
from lgc.comm.transport import Opening, RankError, Transport, clock, release_at_exit, within
from lgc.elastic.lighthouse import Lighthouse, Member

CHUNK = 2**26  # bytes of a state that are sent at once


class LostError(RankError):
    """A round that some rank could not make to its end; it is tried again with those that are left."""


class Begun(NamedTuple):
    """A round that has begun.

    Attributes:
        ranks: that take part, in order.
        behind: those of them that were not where most are, and have taken a state from one that is.
        counts: by rank, whether it brings anything to the round.
    """

    ranks: list[Member]
    behind: list[int]
    counts: list[bool]


class ElasticTransport(Transport):
    """Counted collectives of the ranks that are there: a new group whenever one has come, gone or failed.

        ranks, behind, counts = transport.begin_round(...)
        results = transport.together(posts)
        transport.commit()

    Args:
        lighthouse: finds out who is there.
        description: what all ranks must have the same of, a flat JSON object.
        address: of this machine, on which the others reach it, and on which alone this process listens.
        port: of this rank's store; 0 is any that is free.
        timeout: seconds in which a rank has to take part in a collective, or to receive the next part of a state.
        connect_timeout: seconds in which the ranks of a new group have to connect.

    Raises:
        ValueError: if others could not reach this machine at the address, or another process has the port.
    """

    def __init__(
        self,
        lighthouse: Lighthouse,
        description: Mapping[str, object],
        address: str,
        port: int,
        *,
        timeout: float,
        connect_timeout: float,
    ) -> None:
        self.lighthouse = lighthouse
        self.member = "rank"
        self.device = torch.device("cpu")
        self.wire = Wire()
        self.seconds = 0.0
        self.ranks: list[Member] = []
        self._description = description
        self._form = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
        self._connect_timeout = timedelta(seconds=connect_timeout)
        self._store_server, self._store_address = _listen(address, port)
        self._timeout = timedelta(seconds=timeout)
        self.group: Any = _Group(address, self._timeout, self._connect_timeout)
        self.rank, self.world_size = 0, 1
        self._identity = ""  # of the meeting whose ranks are connected
        self.group.be(self.group.made(dist.HashStore(), 0, 1))
        release_at_exit()
        self.begin(SETUP, steps=0)

    def uncounted(self) -> ElasticTransport:
        other = copy.copy(self)
        other.wire = Wire()
        other.begin(SETUP, steps=0)
        return other

    def called(self, rank: int) -> str:
        return f"rank {self.ranks[rank].name}"

    def announce(self, error: Exception) -> None:
        """Nothing: the others go on without a rank that fails."""

    def open_round(self, step: int, *, error: Exception | None = None, **given: Any) -> Opening:
        try:
            return super().open_round(step, error=error, **given)
        except LostError:
            raise
        except RankError as failure:
            if error is not None:
                raise
            raise LostError(str(failure)) from failure  # of another rank, without which the others go on

    def begin_round(
        self,
        rounds: int,
        told: Mapping[str, Any],
        state: Callable[[], bytes],
        heal: Callable[[bytes], None],
    ) -> Begun:
        """Meet the ranks that are there, and bring those up to date that are not where most are; a collective.

        Args:
            rounds: that this rank has made.
            told: what else it says: "digest" is of what all ranks have alike after so many rounds, "steps" how many
                this one has made since.
            state: what a rank needs to go on from where this one is.
            heal: takes such a state of another rank.

        Raises:
            NoQuorumError: if they do not meet.
            LostError: if a rank is lost meanwhile.
            RuntimeError: if this rank has another form than most, or than as many, naming the first field.
        """
        meeting = self.lighthouse.meet(
            self._store_address, rounds, {**told, "form": self._form, "group": self._identity}
        )
        ranks, before = meeting.members, [each.name for each in self.ranks]
        groups = {each.told["group"] for each in ranks}
        connected = self._identity and groups == {self._identity} and [each.name for each in ranks] == before
        self.ranks = ranks
        if not connected:
            self._connect(meeting.identity)
        current = up_to_date(ranks)
        behind = [rank for rank in range(len(ranks)) if rank not in current]
        for place, rank in enumerate(behind):
            donor = current[place % len(current)]
            with self._timed():
                if self.rank == donor:
                    self._send(state(), rank)
                elif self.rank == rank:
                    heal(self._receive(donor, limit=2 * len(state()) + CHUNK))
        counts = [rank in current and each.told["steps"] > 0 for rank, each in enumerate(ranks)]
        return Begun(ranks, behind, counts)

    def commit(self) -> None:
        """Return if the round counts, as every rank has come to here with all that was sent; a collective.

        Raises:
            LostError: where this rank cannot know, as one was lost here. The others may have committed then.
        """
        self.all_gather(torch.ones(1, dtype=torch.uint8, device="cpu"), "commit")

    def disconnect(self) -> None:
        """Have all ranks connect anew for the next round."""
        self._identity = ""
        self.group.shutdown()

    def leave(self) -> None:
        """Take part no longer."""
        self.lighthouse.leave()
        self.disconnect()

    def _connect(self, identity: str) -> None:
        """Be a group of the ranks that have met, all of the same form."""
        self.disconnect()
        ranks = self.ranks
        self.rank = [each.name for each in ranks].index(self.lighthouse.name)
        self.world_size = len(ranks)
        seconds = self._connect_timeout.total_seconds()
        try:
            with self._timed():
                self.group.be(within(seconds, lambda: self._group_of(ranks, self.rank, identity)))
        except (LostError, TimeoutError) as error:
            reason = str(error.__cause__ or "no answer").partition("\n")[0]
            raise LostError(
                f"lgc: {self.called(self.rank)} could not connect with the others within "
                f"attach(connect_timeout=...)={seconds:g} s ({reason}). They give these addresses, at which each must "
                f"be reached by all others, past any firewall: "
                f"{', '.join(f'{each.name} at {each.store}' for each in ranks)}. Where one of them is wrong, as "
                "127.0.0.1 is between machines, start that rank with another attach(address=...)."
            ) from error
        self._identity = identity
        self._require_same_form()

    def _group_of(self, ranks: list[Member], rank: int, identity: str) -> dist.ProcessGroup:
        host, _, port = ranks[0].store.rpartition(":")
        store = dist.TCPStore(host, int(port), timeout=self._connect_timeout, wait_for_workers=False)
        made: dist.ProcessGroup = self.group.made(dist.PrefixStore(identity, store), rank, len(ranks))
        return made

    def _require_same_form(self) -> None:
        """Raise RuntimeError where this rank has another form than most, or than as many, of the newest ranks."""
        try:
            require_agreement(self.uncounted(), "lgc.elastic.attach", self._description)
        except LostError:
            raise
        except RuntimeError as error:
            newest = max(each.rounds for each in self.ranks)
            forms = Counter(each.told["form"] for each in self.ranks if each.rounds == newest)
            own = forms.pop(self._form, 0)
            most = max(forms.values(), default=0)
            if own > most:
                raise LostError(str(error)) from error
            self.leave()
            what = (
                "The others go on without this one."
                if own < most
                else ("As many have the one as the other, so each of them ends; start those again that are right.")
            )
            raise RuntimeError(f"{error} {what}") from error

    def _send(self, data: bytes, rank: int) -> None:
        whole = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        for part in (torch.tensor([len(data)], device="cpu"), *whole.split(CHUNK)):
            self.group.send([part], rank, 0).wait(self._timeout)

    def _receive(self, donor: int, *, limit: int) -> bytes:
        length = torch.zeros(1, dtype=torch.int64, device="cpu")
        self.group.recv([length], donor, 0).wait(self._timeout)
        if not 0 < int(length) <= limit:
            raise LostError(
                f"lgc: {self.called(donor)} announces a state of {int(length)} bytes, and {limit} are possible."
            )
        whole = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        for part in whole.split(CHUNK):
            self.group.recv([part], donor, 0).wait(self._timeout)
        return whole.numpy().tobytes()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = clock(self.device)
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            raise LostError(
                f"lgc: a rank was lost amid a round, as seen by {self.called(self.rank)}: {error}"
            ) from error
        finally:
            self.seconds += time.perf_counter() - started


def up_to_date(ranks: list[Member]) -> list[int]:
    """The ranks that have made the most rounds, and among them those that most agree with; the first of equals."""
    newest = max(each.rounds for each in ranks)
    digests = [each.told["digest"] for each in ranks if each.rounds == newest]
    usual = max(digests, key=digests.count)
    return [rank for rank, each in enumerate(ranks) if each.rounds == newest and each.told["digest"] == usual]


class _Group(ProcessGroupGloo):  # type: ignore[misc]
    """torchft's group, with sockets on one address alone."""

    def __init__(self, address: str, timeout: timedelta, connect_timeout: timedelta) -> None:
        super().__init__(timeout)
        self._address, self._connect_timeout = address, connect_timeout
        self._set_group_name("lgc.elastic")

    def be(self, group: dist.ProcessGroup) -> None:
        """Be this group from now on."""
        self._pg = group

    def made(self, store: dist.Store, rank: int, world_size: int) -> dist.ProcessGroup:
        """A group of the ranks that meet in a store."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = self._connect_timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._address)]
        group = dist.ProcessGroup(store, rank, world_size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        backend = dist.ProcessGroupGloo(store, rank, world_size, options)
        backend._set_default_timeout(self._timeout)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return group


def _listen(address: str, port: int) -> tuple[dist.TCPStore, str]:
    """A store that listens on one address, and where it is, as host:port; raises ValueError if it cannot."""
    must = f"attach(address=...) must be an address of this machine on which the other ranks reach it, got {address!r}"
    if not isinstance(address, str) or not address:
        raise ValueError(f"{must}.")
    try:
        family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(place[0]).is_unspecified:
            raise ValueError(f"{must}, which is every address, and none to reach it on.")
        listening = socket.create_server(place[:2], family=family)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(
                f"attach(port=...) must be one that this process may listen on, at {address}, got {port} "
                f"({error.strerror}); 0 is any that is free."
            ) from error
        raise ValueError(f"{must} ({error.strerror}); `ip -brief address` lists those that it has.") from error
    with contextlib.closing(listening):
        port = listening.getsockname()[1]
        store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
    return store, f"{address}:{port}"
