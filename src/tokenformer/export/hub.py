"""A model folder for the Hub, which transformers loads where this package is not installed."""

import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tokenformer.errors import UserError
from tokenformer.export.card import model_card
from tokenformer.export.figures import read_evaluation, read_training
from tokenformer.export.remote_code import auto_map, remote_code
from tokenformer.folders import new_folder
from tokenformer.images import load_processor
from tokenformer.inspection import inspect_model
from tokenformer.models import TokenFormerForImageClassification
from tokenformer.models.loading import IMAGE_PROCESSOR, load_tokenformer, load_tokenizer, model_folder


def export_hub(
    model: str,
    out: str,
    *,
    name: str | None = None,
    license: str | None = None,
    eval: list[str] | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write a folder that transformers loads with trust_remote_code=True, with or without this package.

    It holds weights, configuration, tokenizer or image processor, the code of the model, and a model card; that of a
    language model also a generation configuration. The logits are bitwise those of `model`.

    Args:
        model: folder of the model, such as a training run, or a name on the Hub.
        out: folder to write; must not hold anything yet.
        name: owner/name that the model will have on the Hub, for the snippets of the card; the name of `out` if not
            given.
        license: of the weights, by the Hub's identifier, such as apache-2.0; the card names none if not given.
        eval: JSON files that `tokenformer eval --out` wrote for this model; their figures go into the card.
        dtype: of the weights (float32, bfloat16, float16); as saved if not given. Scales stay float32.

    Returns:
        `out`, the `files` in it, their `bytes`, and the model's `parameters`.

    Raises:
        UserError: a model, tokenizer or image processor that cannot be loaded, an unknown dtype, a folder that is not
            empty, an evaluation that cannot be read or is of another model, a name that the Hub would refuse. Nothing
            is written.
    """
    name = Path(out).resolve().name if name is None else _hub_name(name)
    with new_folder(Path(out)) as partial:
        source = model_folder(model)
        loaded = load_tokenformer(source, dtype=dtype)
        kind = loaded.config.model_type
        if isinstance(loaded, TokenFormerForImageClassification):
            load_processor(source)  # says what is wrong with it
            shutil.copyfile(source / IMAGE_PROCESSOR, partial / IMAGE_PROCESSOR)
        else:
            _save_tokenizer(load_tokenizer(source), loaded.config.max_position_embeddings, partial)
        parameters = loaded.num_parameters()
        training = read_training(source, parameters)
        evaluations = [read_evaluation(Path(file), kind, parameters, name) for file in eval or []]

        disable_progress_bar()
        loaded.config.auto_map = auto_map(kind)
        loaded.save_pretrained(partial)
        for file, text in remote_code(kind).items():
            (partial / file).write_text(text, encoding="utf-8")
        card = model_card(inspect_model(partial), name, license=license, training=training, evaluations=evaluations)
        (partial / "README.md").write_text(card, encoding="utf-8")
        files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    return {"out": out, "files": list(files), "bytes": sum(files.values()), "parameters": parameters}


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, context: int, folder: Path) -> None:
    tokenizer.model_max_length = min(tokenizer.model_max_length, context)
    for trace in ("local_files_only", "is_local"):  # of how it was loaded here
        tokenizer.init_kwargs.pop(trace, None)
    tokenizer.save_pretrained(folder)


def _hub_name(name: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"name '{name}' cannot be a name on the Hub ({reason}): use owner/name") from error
    return name
