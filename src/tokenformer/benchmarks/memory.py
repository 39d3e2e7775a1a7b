"""Peak memory of a call: the tensors that are alive at once, counted where torch allocates them.

The peak of a process would hold the interpreter, the libraries, the compiler, the other cases, and what the allocator
keeps for later. Scratch space of the math libraries is left out.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes of new tensors that are alive at once while `call` runs; those from before do not count.

    Call it once before, so that what it keeps (the moments of an optimizer) is there already.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write lines of its own to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with TemporaryDirectory(prefix="tokenformer-bench-") as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted(
        (event["ts"], place, event["args"]["Bytes"])
        for place, event in enumerate(events)
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    alive = peak = 0
    for _, _, count in allocations:
        alive += count
        peak = max(peak, alive)
    return peak


def held_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and the optimizer's moments: what is there between two steps."""
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *moments))
