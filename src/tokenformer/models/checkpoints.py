"""Weights as torch and safetensors write them, and folders in the published format. Nothing read here can run code.

Tensors are mapped into memory where the format allows it: their bytes are read when they are first used.
"""

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from tokenformer.errors import UserError
from tokenformer.published import complete_fields, is_published, our_fields, rename_tensors, weights_of

CONFIG = "config.json"
# In the order of preference, as in transformers.
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# DeepSpeed stores the state of NumPy's generator beside the weights. These build arrays and nothing else.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_ARRAYS: list[Any] = [
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),  # its name before NumPy 2
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no such file (with the message `missing`), or something else in it.
    """
    if not file.is_file():
        raise UserError(missing)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not JSON ({one_line(error)}): copy or save it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object: copy or save it again")
    return value


def one_line(error: BaseException) -> str:
    """What an exception says, short enough for an error message of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_pickle(file: Path) -> Any:
    """What `torch.save` wrote: a new (zip) or an old file, with nothing but tensors and plain Python values in it.

    Raises:
        UserError: the file is damaged, or loading it could run code, which is not done.
    """
    with file.open("rb") as opened:
        start = opened.read(30)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a pointer of Git LFS, not the weights: run `git lfs pull` beside it")
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=_can_be_mapped(file))
    except Exception as error:  # a damaged file fails in a dozen ways
        # Both of torch's messages: "GLOBAL os.system was not an allowed ..." and "... whose module os is blocked".
        if found := re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error)):
            raise UserError(
                f"{file} asks for {found[1]} when it is loaded, which could run code: refused, and nothing was run; "
                "get the weights as safetensors, or from a source that you trust"
            ) from error
        reason = one_line(error).partition(". In PyTorch 2.6")[0]
        raise UserError(f"{file} is damaged, cut short or no file of torch ({reason}): copy it again") from error


def _can_be_mapped(file: Path) -> bool:
    """Whether the tensors of a file lie in it as they are: not in the old format, nor where it was zipped again."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weights file, by the names in it.

    Raises:
        UserError: the file is missing, damaged, holds something else, or asks to run code.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: copy all files of the model")
    if file.suffix != ".safetensors":
        return only_tensors(read_pickle(file), file)
    try:
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged or cut short ({one_line(error)}): copy it again") from error
    return only_tensors(state, file)


def only_tensors(state: Any, file: Path) -> dict[str, torch.Tensor]:
    """`state` if it is a dictionary of dense tensors of a dtype that models are trained in.

    Raises:
        UserError: it is not.
    """
    if not isinstance(state, dict):
        raise UserError(f"{file} holds no dictionary of tensors, but {type(state).__name__}: is it a model's weights?")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(f"{file}: '{name}' is no tensor but {type(tensor).__name__}: is it a model's weights?")
        kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        if kind not in _DTYPES:
            found = str(kind).removeprefix("torch.")
            raise UserError(f"{file}: {name} is {found}: weights are to be float32, bfloat16 or float16, and dense")
    return state


def weights_files(folder: Path) -> list[Path]:
    """The weights files of a folder: one, or those that an index lists. Safetensors are preferred, as in transformers.

    Raises:
        UserError: there are none, or an index that lists nothing or something outside the folder.
    """
    found = next((folder / name for name in WEIGHTS_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no weights: none of {', '.join(WEIGHTS_FILES)}")
    return listed_files(found) if found.suffix == ".json" else [found]


def listed_files(index: Path) -> list[Path]:
    """The files that an index of shards lists.

    Raises:
        UserError: it lists none, or one outside its folder.
    """
    shards = read_json(index, f"{index} is missing").get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} lists no files under 'weight_map': copy or save the model again")
    names = sorted(set(map(str, shards.values())))
    if outside := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index} lists '{outside[0]}', which is not a file beside it: copy or save the model again")
    return [index.parent / name for name in names]


def download(name: str, **options: Any) -> Path:
    """The folder of a model on the Hub, in the cache; of its weights the safetensors, or the rest if there are none.

    Args:
        name: `owner/name`.
        options: of `huggingface_hub.snapshot_download` (`revision`, `token`, ...).
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.safetensors"]
    folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
    if not any(folder.rglob("*.safetensors")):
        folder = Path(snapshot_download(name, allow_patterns=[*patterns, "*.bin"], **options))
    return folder


def find_published(name: str | os.PathLike | None, options: Mapping[str, Any]) -> Path | None:
    """The folder of a published model, downloaded if need be; None if `name` is something else.

    Args:
        name: folder, or name on the Hub.
        options: given to `from_pretrained`, among them where and how to look.
    """
    if name is None or options.get("state_dict") is not None or options.get("gguf_file") is not None:
        return None
    folder, subfolder = Path(name), options.get("subfolder") or ""
    if not folder.is_dir():
        if folder.exists():
            return None
        where = {key: options[key] for key in _HUB_OPTIONS if key in options}
        try:
            fields, _ = PreTrainedConfig.get_config_dict(name, subfolder=subfolder, **where)
        except (OSError, ValueError):
            return None  # transformers will say it better
        if not is_published(fields):
            return None
        folder = download(str(name), **where)
    folder /= subfolder
    return None if published_fields_of(folder) is None else folder


def published_fields_of(folder: Path) -> dict[str, Any] | None:
    """The configuration in a folder if it is in published names, otherwise None."""
    file = folder / CONFIG
    if not file.is_file():
        return None
    fields = read_json(file, f"{file} is missing")
    return fields if is_published(fields) else None


def read_published(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A folder in the published format: the fields of a TokenFormerConfig, and the tensors under our names.

    Raises:
        UserError: weights that are missing, damaged, of the wrong shape, or ask to run code; a configuration that
            contradicts them, or that asks for what this library does not implement.
    """
    tensors: dict[str, torch.Tensor] = {}
    for file in weights_files(folder):
        tensors |= read_tensors(file)
    return translate(read_json(folder / CONFIG, f"{folder} holds no {CONFIG}"), tensors, f"{folder}/{CONFIG}", folder)


def translate(
    fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str, source: str | Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """From published names to ours: the fields of a TokenFormerConfig, and the tensors with their scales.

    Args:
        fields: of the published configuration; sizes may be missing.
        tensors: in published names.
        where: what to call the configuration in errors.
        source: what to call the weights in errors.

    Raises:
        UserError: as `read_published`.
    """
    weights = weights_of(tensors)
    complete = complete_fields(fields, {name: tuple(t.shape) for name, t in weights.items()}, where, f"{source}")
    return our_fields(complete, where), rename_tensors(weights, complete["num_layers"])
