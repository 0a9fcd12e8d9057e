"""Several processes that do one job together, on one machine or many.

They are started by ``torchrun`` or ``mpiexec`` and communicate through torch.distributed with gloo. A process that is
started alone is rank 0 of 1: it does not load MPI, opens no port, and every function here returns at once.
"""

import atexit
import contextlib
import datetime
import ipaddress
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
import torch.distributed as dist

from improved_diffusion.cpu.machine import usable_cores
from improved_diffusion.run.heartbeat import Heartbeat, Listener, LostContact, connect

MEETING_TIME = datetime.timedelta(minutes=2)  # for all processes to connect to each other
# Long, because the others wait while rank 0 reads images, possibly for hours. The heartbeat detects lost processes.
WAITING_TIME = datetime.timedelta(days=30)
PARTING_TIME = 15.0  # seconds for other processes to end after this one, before they are stopped
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
STARTED_BY_US = "IMPROVED_DIFFUSION_PROCESS"  # set in the processes of `start_processes`
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Meeting:
    """What the launcher knows of the processes.

    :ivar store: a torch.distributed store, through which the processes exchange their first addresses.
    :ivar host: the machine of rank 0.
    :ivar one_host: whether all processes are on one machine.
    """

    rank: int
    size: int
    store: Any
    host: str
    one_host: bool


@dataclass
class _Job:
    """The place of this process in the job. :ivar turn: its turn in `rank_0_first`."""

    rank: int
    size: int
    turn: int
    heartbeat: Heartbeat


_job: _Job | None = None


# -- taking part -----------------------------------------------------------------------------------------


def setup_dist() -> None:
    """Join the other processes that ``torchrun`` or an MPI launcher started. A process started alone does nothing.

    The processes of a machine divide its cores, unless OMP_NUM_THREADS sets the threads of each. Only rank 0 prints:
    the standard output of the others is dropped.

    :raises ValueError: the launcher does not fit the installed MPI library or the network.
    :raises LostContact: the others cannot be reached.
    """
    global _job
    if _job is not None:
        return
    try:
        if _started_by_torchrun():
            meeting = _meet_through_torchrun()
        elif _mpi_size() > 1:
            meeting = _meet_through_mpi()
        else:
            return
        _choose_interface(meeting.one_host)
        with _start_heartbeat(meeting) as heartbeat:
            dist.init_process_group(
                "gloo",
                store=meeting.store,
                rank=meeting.rank,
                world_size=meeting.size,
                timeout=WAITING_TIME,
            )
    except (RuntimeError, OSError) as error:
        raise LostContact(
            f"the processes of this job cannot reach each other ({_reason(error)}); where machines have several "
            "networks, GLOO_SOCKET_IFNAME names the interface to use"
        ) from error
    atexit.register(_close)  # otherwise gloo's threads crash when an error ends this process
    _job = _Job(meeting.rank, meeting.size, 0, heartbeat)
    _settle()
    if meeting.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def start_processes(count: int, command: Sequence[str]) -> None:
    """Start `count` - 1 more processes on this machine. In `setup_dist`, this one becomes rank 0 of `count`.

    This process needs not watch them: when one of a job's processes ends, the heartbeat tells the others.

    :param command: the command line that started this process. One of the processes that it starts does nothing here.
    :raises ValueError: a launcher has started this process as one of several.
    """
    if os.environ.get(STARTED_BY_US):
        return
    if _started_by_torchrun() or _mpi_size() > 1:
        raise ValueError(f"{count}: a launcher has already started several processes; leave the flag out")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # free now; torchrun finds one in the same way
    size = str(count)
    place = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.update({**place, "RANK": "0"})
    # In sessions of their own, so that Ctrl-C reaches this process only, which stops all of them at the same step.
    others = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": str(rank), STARTED_BY_US: "1"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        for rank in range(1, count)
    ]
    atexit.register(_wait_for, others)


def _wait_for(processes: Sequence[subprocess.Popen]) -> None:
    """Wait until `processes` have ended, as they do when this one leaves the job. Stop those that do not."""
    deadline = time.monotonic() + PARTING_TIME
    for process in processes:
        for stop in (process.terminate, process.kill, lambda: None):
            try:
                process.wait(max(1.0, deadline - time.monotonic()))
                break
            except subprocess.TimeoutExpired:
                stop()


def finish() -> None:
    """Wait until all processes are done, and disconnect. A process started alone does nothing."""
    barrier()
    leave()


def leave() -> None:
    """Disconnect at once, in the middle of the work. Those who wait for this process then raise `LostContact`."""
    global _job
    if _job is not None:
        _job.heartbeat.stop()
        _job = None
        _close()


def get_rank() -> int:
    """The number of this process, from 0. Only rank 0 writes files and prints."""
    return _job.rank if _job else 0


def get_world_size() -> int:
    """The number of processes."""
    return _job.size if _job else 1


def dev() -> th.device:
    """The device that models are put on: the CPU."""
    return th.device("cpu")


# -- what is exchanged -----------------------------------------------------------------------------------


def all_reduce(tensor: th.Tensor) -> None:
    """Replace `tensor` by the sum over all ranks, in place. All ranks get the same bits.

    This and all functions below need to be called by every rank.

    :raises LostContact: a process has ended. All functions below raise this too.
    """
    if _job is not None:
        with _contact():
            dist.all_reduce(tensor)


def all_reduce_in_16_bits(vector: th.Tensor) -> None:
    """As `all_reduce`, but the numbers are sent in bfloat16, so half as many bytes. They are added in float32.

    Each rank adds one part of the vector and sends the sum to all. The error of an element is up to 0.2% of the sum
    and 0.2% of each summand.

    :param vector: float32, [N].
    """
    if _job is None:
        return
    part = -(-len(vector) // _job.size)
    sent = th.zeros(_job.size, part, dtype=th.bfloat16)
    sent.view(-1)[: len(vector)] = vector
    received = th.empty_like(sent)
    with _contact():
        # As bytes, because gloo does not know the type in all versions of PyTorch.
        dist.all_to_all_single(received.view(th.uint8), sent.view(th.uint8))
        total = received[0].float()
        for summand in received[1:]:
            total += summand
        sums = [th.empty(part, dtype=th.bfloat16) for _ in range(_job.size)]
        dist.all_gather([value.view(th.uint8) for value in sums], total.bfloat16().view(th.uint8))
    vector.copy_(th.cat(sums)[: len(vector)])


def sync_params(params: Iterable[th.Tensor]) -> None:
    """Copy the values of `params` from rank 0 to all ranks, in place."""
    if _job is not None:
        with _contact(), th.no_grad():
            for p in params:
                dist.broadcast(p, 0)


def all_gather(value: Any) -> list[Any]:
    """The `value` of every rank, in the order of the ranks. :param value: of a type that JSON has."""
    if _job is None:
        return [value]
    text = th.frombuffer(bytearray(json.dumps(value).encode()), dtype=th.uint8)
    lengths = th.zeros(_job.size, dtype=th.int64)
    lengths[_job.rank] = len(text)
    all_reduce(lengths)
    texts = [th.empty(int(lengths.max()), dtype=th.uint8) for _ in range(_job.size)]
    padded = th.zeros_like(texts[0])
    padded[: len(text)] = text
    with _contact():
        dist.all_gather(texts, padded)
    return [json.loads(bytes(t[:length].tolist())) for t, length in zip(texts, lengths)]


def broadcast(value: Any) -> Any:
    """The `value` of rank 0. :param value: of a type that JSON has."""
    return all_gather(value)[0] if _job else value


def barrier() -> None:
    """Wait until all ranks have called this."""
    if _job is not None:
        with _contact():
            dist.barrier()


def check_alike(values: dict[str, Any], advice: str) -> None:
    """Check that all ranks have the same `values`.

    :param values: by the names that the message gives them; compared as text, because NaN does not equal itself.
    :param advice: what the message tells the user to do.
    :raises ValueError: they differ. It is raised on every rank and names the first value that differs.
    """
    everybody = all_gather({name: repr(value) for name, value in values.items()})
    for rank, theirs in enumerate(everybody):
        for name, value in everybody[0].items():
            if theirs.get(name) != value:
                raise ValueError(f"{name}: rank {rank} has {theirs.get(name)}, rank 0 {value}; {advice}")


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Execute the body on rank 0 first, then in one process of each other machine, then in all others.

    So the later processes find what the first one has stored on their machine, or on a shared file system.
    """
    for turn in range(3):
        if turn == (_job.turn if _job else 0):
            yield
        barrier()


def share(numbers: range) -> range:
    """The part of `numbers` for this rank: consecutive numbers. The sizes of the parts differ by at most one."""
    first, last = (len(numbers) * n // get_world_size() for n in (get_rank(), get_rank() + 1))
    return numbers[first:last]


def gather_arrays(array: np.ndarray) -> np.ndarray:
    """Concatenate the arrays of all ranks along the first axis, on rank 0.

    :param array: [n, ...]; only n may differ between ranks.
    :return: on rank 0, all arrays in the order of the ranks; on the others, their own `array`.
    """
    if _job is None:
        return array
    lengths = all_gather(len(array))
    if _job.rank > 0:
        if len(array):
            with _contact():
                dist.send(th.from_numpy(np.ascontiguousarray(array)), 0)
        return array
    parts = [array]
    for rank in range(1, _job.size):
        part = np.empty((lengths[rank], *array.shape[1:]), array.dtype)
        if len(part):
            with _contact():
                dist.recv(th.from_numpy(part), rank)
        parts.append(part)
    return np.concatenate(parts)


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    """A block of communication. If another process ends during it, it raises `LostContact`."""
    with _job.heartbeat:
        try:
            yield
        except RuntimeError as error:
            raise LostContact(
                f"another process of this job has ended; its own output says why ({_reason(error)})"
            ) from error


def _reason(error: Exception) -> str:
    """The first sentence of an error of torch, without the place in torch's source."""
    return re.sub(r"^\[.*?\]\s*", "", re.split(r"\n|\. ", str(error))[0])


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# -- how processes connect -------------------------------------------------------------------------------


def _started_by_torchrun() -> bool:
    return all(name in os.environ for name in TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def _mpi_size() -> int:
    """The number of processes by the environment variables of an MPI launcher; 1 without one."""
    for name in MPI_SIZES:
        if name in os.environ:
            return int(os.environ[name])
    # Slurm's launcher with PMIx. A batch script also has SLURM_STEP_NUM_TASKS, but no PMIX_RANK.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if "PMIX_RANK" in os.environ else 1


def _meet_through_torchrun() -> _Meeting:
    store, rank, size = next(dist.rendezvous("env://", timeout=MEETING_TIME))
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    return _Meeting(rank, size, store, os.environ["MASTER_ADDR"], one_host)


def _meet_through_mpi() -> _Meeting:
    """Use MPI to send the address of rank 0 to the others, and then finalize it."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # otherwise, a process that ends by an error would wait for the others
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"started by an MPI launcher, but mpi4py finds no MPI library ({_reason(error)}); "
            'pip install "improved_diffusion[mpi]", or start with torchrun'
        ) from error
    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    if size != _mpi_size():
        raise ValueError(
            f"mpiexec started {_mpi_size()} processes, but the MPI library that mpi4py found counts {size}: they "
            f"belong to different MPI installations; use the mpiexec of {MPI.get_vendor()[0]}"
        )
    one_host = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_size() == size
    host = "127.0.0.1" if one_host else os.environ.get("MASTER_ADDR") or socket.gethostname()
    port = int(os.environ.get("MASTER_PORT", 0))  # 0: any free one

    def open_store(host: str, port: int) -> dist.TCPStore:
        return dist.TCPStore(host, port, size, rank == 0, timeout=MEETING_TIME, wait_for_workers=False)

    store = open_store(host, port) if rank == 0 else None
    host, port = comm.bcast((host, store and store.port))
    store = store or open_store(host, port)
    MPI.Finalize()
    return _Meeting(rank, size, store, host, one_host)


def _choose_interface(one_host: bool) -> None:
    """Set the network interface for gloo, or check that the others can reach the one that gloo would choose.

    gloo listens at the address that this machine's name resolves to.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    interfaces = [name for _, name in socket.if_nameindex()]
    if one_host:
        # Other interfaces, such as a laptop's wireless network, may disappear during days of training.
        for loopback in {"lo", "lo0"}.intersection(interfaces):
            os.environ["GLOO_SOCKET_IFNAME"] = loopback
        return
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if ipaddress.ip_address(address).is_loopback:
            raise ValueError(
                f"this machine's name, {socket.gethostname()}, resolves to {address}, at which other machines cannot "
                f"reach it: set GLOO_SOCKET_IFNAME to its network interface, one of {', '.join(interfaces)}"
            )


def _start_heartbeat(meeting: _Meeting) -> Heartbeat:
    seconds = MEETING_TIME.total_seconds()
    if meeting.rank == 0:
        listener = Listener()
        meeting.store.set("heartbeat", listener.address)
        return Heartbeat(listener.accept(meeting.size - 1, seconds))
    address = meeting.store.get("heartbeat").decode()
    return Heartbeat(connect(meeting.host, address, meeting.rank, seconds))


def _settle() -> None:
    """Set the turn of this process and its number of threads, by the processes on the same machine."""
    affinity = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    places = all_gather([socket.gethostname(), affinity])
    hosts = [host for host, _ in places]
    first_here = hosts.index(hosts[_job.rank]) == _job.rank
    _job.turn = 0 if _job.rank == 0 else 1 if first_here else 2
    # torchrun sets 1 if the user has set nothing.
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or (threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        th.set_num_threads(max(1, usable_cores() // places.count(places[_job.rank])))
