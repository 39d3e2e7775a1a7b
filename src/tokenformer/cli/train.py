"""`tokenformer train RECIPE.yaml [--any.field value]`."""

from pathlib import Path
from typing import TYPE_CHECKING

from tokenformer.cli.parser import Parser
from tokenformer.errors import UserError

if TYPE_CHECKING:
    from tokenformer.training.recipe import Recipe

_USAGE = "tokenformer train [RECIPE.yaml] [--field value ...]"
_EXAMPLE = """\
  tokenformer train recipes/language/small.yaml --data.path data/books --out runs/small
  tokenformer train recipes/language/small.yaml --data.path data/books --out runs/small  # again: resumes"""


def parse(argv: list[str]) -> "Recipe":
    """The recipe that a command line describes: the YAML file, then the overrides."""
    from tokenformer.training.recipe import Recipe

    summary = "Train a model from a recipe. The same command resumes a run that was stopped."
    parser = Parser("train", summary, _EXAMPLE, usage=_USAGE)
    parser.add_argument("recipe", nargs="?", help="YAML file with any of the fields below")
    parser.add_class_arguments(Recipe)
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
    values = parser.instantiate(parser.parse_args(argv, namespace=from_file))
    if values.pop("recipe") is not None:
        raise UserError("give one recipe file, and everything else as --field value")
    return Recipe(**vars(values))


def main(argv: list[str]) -> None:
    """Train, and say where the model is and what can be done with it."""
    recipe = parse(argv)
    from tokenformer.training import train

    summary = train(recipe)
    out = recipe.out
    print(
        f"model: {out}   held-out perplexity {summary['eval_perplexity']:.2f}, "
        f"{summary['eval_bits_per_byte']:.3f} bits per byte"
    )
    print(f"next:  tokenformer generate {out} --prompt 'Once'")
    print(f"       tokenformer grow {out} {out}-grown --qkv N --output N --ffn N")
