"""`tokenformer train RECIPE.yaml [--any.field value]`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenformer.cli.parser import Parser, task_of
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from tokenformer.training.image_recipe import ImageRecipe
    from tokenformer.training.recipe import Recipe

_USAGE = "tokenformer train [RECIPE.yaml] [--field value ...]"
_EXAMPLE = """\
  tokenformer train recipes/language/small.yaml --data.path data/books --out runs/small
  tokenformer train recipes/language/small.yaml --data.path data/books --out runs/small  # again: resumes
  tokenformer train recipes/vision/digits.yaml
  tokenformer train recipes/vision/imagenet-b16.yaml --dry-run"""


def parse(argv: list[str]) -> "Recipe | ImageRecipe":
    """The recipe that a command line describes: the YAML file, then the overrides."""
    return _parse(argv)[0]


def _parse(argv: list[str]) -> tuple["Recipe | ImageRecipe", dict[str, Any]]:
    """The recipe, and the options that are not part of it."""
    from tokenformer.training.image_recipe import ImageRecipe
    from tokenformer.training.recipe import Recipe

    kind: Any = Recipe if task_of(argv) is None else ImageRecipe
    summary = "Train a model from a recipe. The same command resumes a run that was stopped."
    parser = Parser("train", summary, _EXAMPLE, usage=_USAGE)
    parser.add_argument("recipe", nargs="?", help="YAML file with any of the fields below")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show steps, learning rates, FLOPs, memory and hours of an image classifier, and do nothing",
    )
    parser.add_argument("--gpu", type=str, default="a100", help="of the dry run's hours; cpu measures this machine")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that the dry run assumes")
    parser.add_class_arguments(kind)
    recipe, options = recipe_from(parser, kind, argv)
    return recipe, options


def recipe_from(parser: Parser, kind: Any, argv: list[str]) -> tuple[Any, dict[str, Any]]:
    """The recipe of a command line whose parser has a `recipe` file and the fields of `kind`, and its other options.

    Raises:
        UserError: a file that is not there or cannot be read, or a second one.
    """
    defaults = []
    if argv and not argv[0].startswith("-"):
        path = Path(argv[0])
        if not path.is_file():
            raise UserError(f"recipe {path} not found")
        defaults, argv = [path], argv[1:]
    try:
        from_file = parser.parse_path(defaults[0], defaults=True) if defaults else parser.get_defaults()
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {defaults[0]} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except UserError as error:
        raise UserError(f"recipe {defaults[0]}: {error}") from error
    values = vars(parser.instantiate(parser.parse_args(argv, namespace=from_file)))
    if values.pop("recipe") is not None:
        raise UserError("give one recipe file, and everything else as --field value")
    fields = {field.name for field in dataclasses.fields(kind)}
    options = {name: values.pop(name) for name in list(values) if name not in fields}
    return kind(**values), options


def main(argv: list[str]) -> None:
    """Train, and say where the model is and what can be done with it."""
    recipe, options = _parse(argv)
    from tokenformer.parallel.mesh import is_main_process
    from tokenformer.training import ImageRecipe, train

    if options.pop("dry_run"):
        if not isinstance(recipe, ImageRecipe):
            raise UserError("--dry-run is for image classifiers: write a plan, and use `tokenformer run --dry-run`")
        from tokenformer.plans.image_dry_run import image_dry_run, print_image_dry_run

        print_image_dry_run(image_dry_run(recipe, **options))
        return

    summary = train(recipe)
    if not is_main_process():
        return
    out = recipe.out
    if isinstance(recipe, ImageRecipe):
        print(
            f"model: {out}   held-out top-1 {summary['eval_top1']:.2%}, top-5 {summary['eval_top5']:.2%} of "
            f"{summary['eval_images']:,.0f} images"
        )
        print(f"next:  tokenformer eval {out} --images {recipe.data.train}")
        print(f"       tokenformer grow {out} {out}-grown --qkv N --output N --ffn N")
        return
    print(
        f"model: {out}   held-out perplexity {summary['eval_perplexity']:.2f}, "
        f"{summary['eval_bits_per_byte']:.3f} bits per byte"
    )
    print(f"next:  tokenformer generate {out} --prompt 'Once'")
    print(f"       tokenformer grow {out} {out}-grown --qkv N --output N --ffn N")
