"""One model over several processes, on torch's DeviceMesh, DTensor, FSDP2 and distributed checkpoints."""

from tokenformer.parallel.checkpoints import load_optimizer_shards, load_shards, save_shards
from tokenformer.parallel.folders import export_checkpoint, load_slices, write_model
from tokenformer.parallel.mesh import Layout, Ranks
from tokenformer.parallel.sharding import shard_model

__all__ = [
    "Layout",
    "Ranks",
    "export_checkpoint",
    "load_optimizer_shards",
    "load_shards",
    "load_slices",
    "save_shards",
    "shard_model",
    "write_model",
]
