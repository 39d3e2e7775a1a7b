"""Weights as safetensors, without a second copy of them in memory."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from tokenformer.convert.reading import Progress
from tokenformer.models.loading import INDEX

# Larger models are written as several files: where the dtype changes, one of them is in memory at a time.
_SHARD_BYTES = 2**30


def write_safetensors(
    tensors: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype],
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """Write tensors as `model.safetensors`, or as numbered files of about 1 GiB with an index.

    A tensor that is mapped from a file and keeps its dtype goes from there to the new file, without a copy in memory.

    Args:
        tensors: by name.
        dtypes: to be written in, by name.
        folder: to write into.
        progress: called with the bytes that are done and those there are in all.
    """
    # Planned on the meta device: what is mapped from one file shares its storage, and would be kept in one shard.
    planned = {name: torch.empty_like(t, dtype=dtypes[name], device="meta") for name, t in tensors.items()}
    shards = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD_BYTES
    )
    total = sum(tensor.nbytes for tensor in planned.values())
    done = 0
    for file, names in shards.filename_to_tensors.items():
        shard: dict[str, torch.Tensor] = {}
        storages: set[int] = set()
        for name in names:
            tensor = tensors[name].to(dtypes[name]).contiguous()
            if tensor.data_ptr() in storages:  # two names for one tensor, which safetensors refuses
                tensor = tensor.clone()
            storages.add(tensor.data_ptr())
            shard[name] = tensor
        save_file(shard, folder / file, metadata={"format": "pt"})
        done += sum(tensor.nbytes for tensor in shard.values())
        if progress is not None:
            progress(done, total)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
