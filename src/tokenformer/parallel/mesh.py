"""The processes of one run, started by torchrun: how they are laid out, and what they tell each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tokenformer.errors import UserError
from tokenformer.parallel.heartbeat import start_heartbeat

DATA, SHARD, TENSOR = "data", "shard", "tensor"
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What accelerate takes for a launch of its own.
_NOTICED = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Longer than any wait for each other: for the rank that writes the last file of a checkpoint, and for another's first
# batch. A process that hangs is noticed sooner (heartbeat.py).
_TIMEOUT_SECONDS = 600.0
_LOST = ("gloo/", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


@dataclass(frozen=True)
class Layout:
    """How many processes share what; their product is the number of processes.

    Attributes:
        data: groups with a whole model each, and other rows.
        shard: processes that share the parameters of one such group, each with other rows (FSDP2).
        tensor: processes that share every layer's parameter tokens and see the same rows.
    """

    data: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def processes(self) -> int:
        """All together."""
        return self.data * self.shard * self.tensor

    @property
    def batch_parts(self) -> int:
        """Parts that a batch is cut into."""
        return self.data * self.shard

    def __str__(self) -> str:
        return f"data {self.data} x shard {self.shard} x tensor {self.tensor}"


def launched_processes() -> int:
    """Processes that torchrun started; 1 outside of it."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 1


def local_processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched_processes() > 1 else 1


def use_one_gpu() -> None:
    """Let this process see its own GPU alone, before CUDA is first used; nothing changes outside of a launch."""
    if launched_processes() > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        local = int(os.environ["LOCAL_RANK"])
        if visible == [""]:
            os.environ["CUDA_VISIBLE_DEVICES"] = str(local)
        elif len(visible) > 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)]


def is_main_process() -> bool:
    """Whether this process speaks for the run: rank 0, or the only one."""
    return launched_processes() == 1 or os.environ["RANK"] == "0"


class Ranks:
    """The processes of a run, from the view of one of them.

    Args:
        layout: of all processes.
        device: of this one; of a GPU, the kind alone (`use_one_gpu`).
        timeout: seconds after which waiting for another process is an error.

    Attributes:
        mesh: (data, shard, tensor).
        main: whether this is the process that writes what is written once.
        batch_part: which part of a batch is for this process.
    """

    def __init__(self, layout: Layout, device: torch.device, timeout: float | None = None) -> None:
        self.layout, self.device = layout, device
        if not dist.is_initialized():
            seconds = timeout or float(os.environ.get("TOKENFORMER_TIMEOUT", _TIMEOUT_SECONDS))
            # Gloo carries what is decided on the CPU, which then waits for no GPU.
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(seconds=seconds),
                **_meeting_point(),
            )
            if launched_processes() > 1:
                start_heartbeat()
        sizes = (layout.data, layout.shard, layout.tensor)
        self.mesh: DeviceMesh = init_device_mesh(device.type, sizes, mesh_dim_names=(DATA, SHARD, TENSOR))
        self.rank = dist.get_rank()
        self.main = self.rank == 0
        data, shard = self.mesh.get_local_rank(DATA), self.mesh.get_local_rank(SHARD)
        self.batch_part = data * layout.shard + shard

    def barrier(self) -> None:
        """Wait until all are here."""
        self.any(False)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true where it is true for any process."""
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return tuple(bool(flag) for flag in raised.tolist())

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over the parts of a batch; every process has the same."""
        # Processes of one tensor group hold the same value: the mean over all is that over the parts.
        total = value.detach().to(torch.float64, copy=True)
        dist.all_reduce(total)
        return (total / self.layout.processes).to(value.dtype)

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """A scalar summed over all processes; every process has the same."""
        dist.all_reduce(value)
        return value

    def sums(self, *values: float) -> tuple[float, ...]:
        """Each number summed over the parts of a batch."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return tuple(total.div(self.layout.tensor).tolist())

    def from_main(self, value: Any) -> Any:
        """What the main process has, given to all."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Let accelerate take this process for the only one: the model is sharded, and needs no wrapping."""
        hidden = {name: os.environ.pop(name) for name in _NOTICED if name in os.environ}
        try:
            yield
        finally:
            os.environ.update(hidden)


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process of this run is gone."""
    if not dist.is_initialized():
        return False
    # Gloo's errors have no class of their own.
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)


def _meeting_point() -> dict[str, Any]:
    """Where processes find each other's addresses, apart from those of an attempt before a restart.

    torchrun keeps its store over a restart, where a fast process then finds the addresses of dead ones. On several
    machines the count of restarts need not be the same, so that torch's own way stays.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return {}
    store, rank, world_size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": world_size}


def check_launch(layout: Layout) -> None:
    """See that as many processes were started as a layout has.

    Raises:
        UserError: the layout is for another number of processes.
    """
    started, wanted = launched_processes(), layout.processes
    if wanted != started == 1:
        raise UserError(
            f"parallel: {layout} needs {wanted} processes: start it with "
            f"`torchrun --nproc-per-node {wanted} -m tokenformer train ...`"
        )
    if wanted != started:
        raise UserError(
            f"parallel: {layout} makes {wanted}, and {started} processes run: the product must be {started}"
        )
