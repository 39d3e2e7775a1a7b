"""Measures a training step of one of several processes: run by test_plan_scale.py, prints a line of JSON a layout.

A fake process group stands for the others: what it gathers and sums is wrong, but shapes, memory and calls are those
of a real run. torch's own tracker counts the memory; bytes are counted from what the collectives are given.
"""

import json
import os
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenformer import TokenFormerConfig, TokenFormerForCausalLM
from tokenformer.parallel import Layout, shard_model


class Sent(TorchDispatchMode):
    """Bytes that a process of a ring sends for the collectives called meanwhile, by collective."""

    def __init__(self, meshes):
        super().__init__()
        self.sizes = {group.group_name: group.size() for group in meshes}
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if "c10d" in name:
            self.count(name, args)
        return function(*args, **(kwargs or {}))

    def count(self, name, args):
        kind = next((k for k in ("gather", "reduce_scatter", "all_reduce", "allreduce") if k in name), None)
        if kind is None:
            return
        group = next((a for a in args if isinstance(a, str) and a in self.sizes), None)
        if group is None:
            group = next(dist.ProcessGroup.unbox(a).group_name for a in args if isinstance(a, torch.ScriptObject))
        n = self.sizes[group]
        tensors = [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]
        size = max(t.numel() * t.element_size() for t in tensors)
        if kind == "gather" and len(tensors) == 1:
            size *= n  # the functional form is given what one process has
        factor = 2 if "reduce" in kind and "scatter" not in kind else 1
        self.bytes[kind] = self.bytes.get(kind, 0) + factor * size * (n - 1) / n


def measure(case):
    """Peak bytes and sent bytes of the second step."""
    layout = Layout(*case["layout"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.processes)
    mesh = init_device_mesh("cpu", case["layout"], mesh_dim_names=("data", "shard", "tensor"))
    torch.manual_seed(0)
    model = TokenFormerForCausalLM(TokenFormerConfig(**case["config"])).train()
    if "gradient_checkpointing" in case["saving"]:
        model.gradient_checkpointing_enable()
    if "recompute" in case["saving"]:
        model.set_recompute()
    model.fused_loss = "fused_loss" in case["saving"]
    shard_model(model, SimpleNamespace(layout=layout, mesh=mesh))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    ids = torch.randint(case["config"]["vocab_size"], (case["rows"], case["length"]))
    with tracker:
        for _ in range(2):  # in the second step gradients and moments are there
            sent = Sent([mesh.get_group(name) for name in mesh.mesh_dim_names])
            with sent:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case["precision"] == "bf16"):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
            optimizer.step()
            tracker.reset_mod_stats()
    peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    dist.destroy_process_group()
    return {"peak": peak, "sent": sent.bytes}


for line in sys.stdin:
    # A process of its own: groups of an earlier layout would be found again.
    if not os.fork():
        print(json.dumps(measure(json.loads(line))), flush=True)
        os._exit(0)
    _, status = os.wait()
    if status:
        sys.exit(f"{line} failed")
