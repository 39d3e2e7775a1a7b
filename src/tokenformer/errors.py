"""The one exception for what a user can put right."""

from importlib.util import find_spec


class UserError(ValueError):
    """Something the user gave is wrong; the message is one line that names the thing and the fix.

    The command line prints it without a traceback and exits with code 2.

    Attributes:
        everywhere: of several processes of one run, each says so; otherwise all find the same, and the first speaks.
    """

    everywhere = False


def require_extra(extra: str, *modules: str) -> None:
    """Ask for the modules of an optional dependency before they are imported.

    Args:
        extra: of this package, which installs them (`eval`, `serve`, `onnx`).
        modules: top-level names that are imported next.

    Raises:
        UserError: one is not installed.
    """
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"this needs {module}, which is not installed: pip install 'tokenformer[{extra}]'")
