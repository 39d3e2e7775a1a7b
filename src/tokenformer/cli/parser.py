"""The argument parser of every verb: typed signatures in, one clear line out when something is wrong."""

import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NoReturn

import jsonargparse

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

    def __init__(self, verb: str, summary: str, example: str, **kwargs: Any) -> None:
        super().__init__(
            prog=f"tokenformer {verb}",
            description=summary,
            epilog=f"example:\n{example}",
            formatter_class=_Help,
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
            expected = re.sub(r"<class '(\w+)'>|typing\.Literal", r"\1", found[2])
            return f"{found[1]}: expected {expected}, got '{found[3]}'"
        return message

    def _unknown(self, name: str) -> str:
        valid = [a.dest for a in self._actions if a.dest not in ("help", "print_config", "print_shtab")]
        bare = name.lstrip("-")
        near = get_close_matches(bare, valid, n=1, cutoff=0.5) or get_close_matches(
            bare.split(".")[-1], valid, n=1, cutoff=0.5
        )
        shown = f"--{near[0]}" if name.startswith("-") and near else (near[0] if near else "")
        return f"unknown option '{name}'" + (f": did you mean '{shown}'?" if near else ": see --help")


def call(function: Callable[..., Any], parser: Parser, argv: list[str]) -> Any:
    """Parse `argv` by the signature of `function` (required parameters are positional) and call it.

    Names, types, defaults and help texts all come from the function itself, so the command cannot drift from the API.
    """
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True)
    return function(**vars(parser.instantiate_classes(parser.parse_args(argv))))
