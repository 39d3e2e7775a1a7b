"""Brief training of a model that was shrunk, into a folder that holds the model alone."""

import tempfile
from pathlib import Path
from typing import Any

from tokenformer.errors import UserError
from tokenformer.folders import new_folder, saving
from tokenformer.models.loading import copy_preprocessing, holds_image_classifier, load_model, quiet
from tokenformer.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, TrainingRecipe
from tokenformer.training.run import train


def heal_folder(
    model: str,
    out: str,
    *,
    data: str,
    tokens: int,
    learning_rate: float = 3e-4,
    batch_size: int = 8,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the language model in a folder for a short while and write it to a new one, with its tokenizer.

    A run that is long enough to be stopped and resumed is one of `tokenformer train`, with the folder as model.path.

    Args:
        model: folder of the model.
        out: folder to write; must not hold anything yet.
        data: folder of `tokenformer data prepare`, made with the model's tokenizer.
        tokens: to train on.
        learning_rate: at its peak, after a warm-up of 5 % of the steps; goes down to a tenth of that, as a cosine.
        batch_size: rows per step.
        threads: CPU threads; all cores if not given.
        progress: show a bar on stderr.

    Returns:
        The summary of the run, `eval_perplexity` on the held-out rows of the data among it.

    Raises:
        UserError: an image classifier; whatever `train` finds. Nothing is written then.
    """
    if holds_image_classifier(Path(model)):
        raise UserError(
            f"{model} holds an image classifier: heal it with `tokenformer train`, and --model.path {model}"
        )
    target = Path(out)
    with new_folder(target) as partial, tempfile.TemporaryDirectory(dir=partial) as work:
        run = Path(work) / "run"
        summary = train(
            Recipe(
                out=str(run),
                model=ModelRecipe(path=model),
                data=DataRecipe(path=data),
                optimizer=OptimizerRecipe(learning_rate=learning_rate, warmup=0.05),
                training=TrainingRecipe(tokens=tokens, batch_size=batch_size, save_every=0, threads=threads),
            ),
            progress=progress,
            title="heal",
        )
        with quiet(), saving(target):
            load_model(run).save_pretrained(partial)
        copy_preprocessing(run, partial)
    return summary
