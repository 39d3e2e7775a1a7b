"""The argument parser of every verb: typed signatures in, one clear line out when something is wrong."""

import inspect
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import jsonargparse
import yaml
from docstring_parser import parse

from tokenformer.errors import UserError


class _Help(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the example at the end."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(f"{indent}{line}\n" for line in text.splitlines())


class Parser(jsonargparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s of one line, naming the nearest valid option.

    Args:
        verb: the words after `tokenformer`, such as ``data prepare``.
        summary: one line that says what the verb does.
        example: commands shown at the end of `--help`.
    """

    def __init__(self, verb: str = "", summary: str = "", example: str = "", **kwargs: Any) -> None:
        # Without arguments: jsonargparse makes parsers like this one for dataclasses within lists.
        super().__init__(
            prog=f"tokenformer {verb}",
            description=summary,
            epilog=f"example:\n{example}",
            formatter_class=_Help,
            allow_abbrev=False,  # a prefix that works today is another option tomorrow
            **kwargs,
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what jsonargparse found as one line with the nearest valid name."""
        raise UserError(self._one_line(message)) from ex

    def _one_line(self, message: str) -> str:
        if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            return self._unknown(f"{found[1]}.{found[2]}")
        if found := re.search(r"Option '([\w.]+)' is not accepted|Key '([\w.]+)' is not expected", message):
            return self._unknown(found[1] or found[2])
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            return self._unknown(found[1].split("=")[0])
        if found := re.search(r'Parser key "([\w.]+)":.*?Given value: ([^\n]*)', message, re.DOTALL):
            expected = ", ".join(re.findall(r"Expected a ([^\n.]+)", found[0])) or "another type"
            expected = re.sub(r"<class '(\w+)'>", r"\1", expected).replace("NoneType", "null")
            return f"{found[1]}: expected {expected}, got '{found[2]}'"
        if found := re.search(r'Parser key "([\w.]+)":\s*Expected a (.+)\. Got value: ([^\n]*)', message):
            expected = re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", found[2])
            return f"{found[1]}: expected {expected}, got '{found[3]}'"
        return message

    def _unknown(self, name: str) -> str:
        valid = [word.lstrip("-") for action in self._actions for word in action.option_strings or [action.dest]]
        bare = name.lstrip("-")
        near = get_close_matches(bare, valid, n=1, cutoff=0.5) or get_close_matches(
            bare.split(".")[-1], valid, n=1, cutoff=0.5
        )
        shown = f"--{near[0]}" if name.startswith("-") and near else (near[0] if near else "")
        return f"unknown option '{name}'" + (f": did you mean '{shown}'?" if near else ": see --help")


def task_of(argv: list[str]) -> str | None:
    """The task that a command line asks for: that of --task, or of the YAML file that comes first; None if none."""
    for place, word in enumerate(argv):
        if word == "--task":
            return "".join(argv[place + 1 : place + 2])
        if word.startswith("--task="):
            return word.partition("=")[2]
    try:
        tree = yaml.safe_load(Path(argv[0]).read_text(encoding="utf-8")) if argv and Path(argv[0]).is_file() else None
    except (yaml.YAMLError, UnicodeDecodeError):  # parsing it says what is wrong with it
        return None
    return tree.get("task") if isinstance(tree, dict) else None


def call(
    function: Callable[..., Any],
    parser: Parser,
    argv: list[str],
    *,
    positional: bool = True,
    skip: Sequence[str] = (),
) -> Any:
    """Parse `argv` by the signature of `function` and call it.

    Names, types, defaults and help texts all come from the function and its docstring, so the command cannot drift
    from the API. `num_tokens` becomes `--num-tokens`, a bool is a flag, a list takes several words.

    Args:
        function: with typed parameters and a docstring that describes each of them.
        parser: of the verb.
        argv: the words after the verb.
        positional: required parameters in front of the `*` are given without a name.
        skip: parameters that the command line does not offer.
    """
    add_signature(parser, function, positional=positional, skip=skip)
    return function(**parser.parse_args(argv).as_dict())


def add_signature(
    parser: Parser, function: Callable[..., Any], *, positional: bool = True, skip: Sequence[str] = ()
) -> None:
    """Add the parameters of `function` to `parser`, as `call` describes."""
    types = get_type_hints(function)
    helps = {parameter.arg_name: parameter.description for parameter in parse(function.__doc__ or "").params}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip:
            continue
        required = parameter.default is inspect.Parameter.empty
        options: dict[str, Any] = {"help": helps[name]}
        if types[name] is bool:
            options |= {"action": "store_true"}
        elif types[name] in (list[str], list[str] | None):
            options |= {"type": str, "nargs": "+"}
        else:
            options |= {"type": types[name]}
        if positional and required and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            parser.add_argument(name, **options)
        elif required:
            parser.add_argument(f"--{name.replace('_', '-')}", required=True, **options)
        else:
            parser.add_argument(f"--{name.replace('_', '-')}", default=parameter.default, **options)
