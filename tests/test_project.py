"""The project keeps its own rules: documented names, cheap start, pinned versions, commands in documents that exist."""

import ast
import inspect
import io
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tokenformer
from tokenformer import cli

ROOT = Path(__file__).parents[1]
MODULES_OF_PUBLIC_NAMES = (tokenformer, tokenformer.nn, tokenformer.ops)


def _tracked(*patterns: str) -> list[Path]:
    """Files that are in git or would be with `git add --all`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [path for name in names if name and (path := ROOT / name).is_file()]


# Public names


@pytest.mark.parametrize(
    ("module", "name"),
    [pytest.param(m, n, id=f"{m.__name__}.{n}") for m in MODULES_OF_PUBLIC_NAMES for n in m.__all__],
)
def test_public_name_is_documented(module, name):
    value = getattr(module, name)
    if not (inspect.ismodule(value) or callable(value)):
        return  # a constant such as __version__
    doc = value.__doc__ or ""
    assert doc.strip(), f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"the docstring of {name} is the one a dataclass makes by itself"


def test_lazy_names_are_the_public_names():
    assert set(tokenformer._LAZY) == set(tokenformer.__all__) - {"__version__"}
    assert set(tokenformer.__all__) <= set(dir(tokenformer))


def test_versions_agree():
    assert metadata.version("tokenformer") == tokenformer.__version__
    assert f"## [{tokenformer.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# Command line


@cache
def _help(*words: str) -> tuple[int, str]:
    """Exit code and output of `tokenformer WORDS --help`."""
    with redirect_stdout(io.StringIO()) as shown, redirect_stderr(io.StringIO()):
        try:
            code = cli.main([*words, "--help"])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, shown.getvalue()


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verb_help_has_an_example(verb):
    code, shown = _help(verb)
    assert code == 0
    assert re.search(rf"examples?:\n\s*tokenformer {verb}\b", shown), shown


HEAVY = ("torch", "transformers", "datasets", "numpy", "jsonargparse", "matplotlib")


@pytest.mark.parametrize("code", ["import tokenformer", "from tokenformer.cli import main; main(['--help'])"])
def test_start_imports_nothing_heavy(code):
    report = f"{code}; import sys; print('loaded:', *(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_help_starts_quickly():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "tokenformer", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    # 0.1 s on a quiet machine; the best of three, because this one may be busy.
    assert min(seconds() for _ in range(3)) < 1.0


# Files


# Machine paths and package-index addresses: true on one machine only.
PLACES = {
    "a path of one machine": re.compile(r"(?<![\w.~}-])/(?:home|root|Users|work|mnt)/\w"),
    "the address of a package index": re.compile(r"(?i)https?://[\w.:@/-]*(?:pypi|pythonhosted|/simple\b|/whl\b)"),
    "a file address": re.compile(r"(?i)\bfile:/{2,3}\w"),
}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("data_dir: /home" + "/ann/books", "a path of one machine"),
        ("--index-url https:" + "//download.example.org/whl/cpu", "the address of a package index"),
        ("see file:" + "///etc/hosts", "a file address"),
        ("see src/data/home/files and https://example.org/home/page", None),
    ],
)
def test_place_patterns(text, found):
    assert next((what for what, pattern in PLACES.items() if pattern.search(text)), None) == found


def test_files_name_no_machine():
    found = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # binary
        for number, line in enumerate(text.splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}" for what, pattern in PLACES.items() if pattern.search(line)
            ]
    assert not found


def test_python_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in _tracked("*.py")}
    assert lengths
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 500}


def test_documentation_pages_exist():
    def pages(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict | list):
            for child in node.values() if isinstance(node, dict) else node:
                yield from pages(child)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    in_nav = set(pages(nav))
    on_disk = {path.relative_to(ROOT / "docs").as_posix() for path in _tracked("docs/*.md")}
    assert in_nav == on_disk


# Layers


def _layers() -> list[str]:
    """Modules of the package in the order of CONTRIBUTING.md: each may import from those before it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = text.split("```text\nsrc/tokenformer/\n")[1].split("```")[0]
    return re.findall(r"^    (\w+)(?:/|\.py) ", block, re.MULTILINE)


def _imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, but for those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {child for node in only_types for child in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("tokenformer."))


def test_imports_follow_the_layers():
    layers = _layers()
    package = ROOT / "src" / "tokenformer"
    own = {path: path.relative_to(package).parts[0].removesuffix(".py") for path in sorted(package.rglob("*.py"))}
    own = {path: layer for path, layer in own.items() if not layer.startswith("__")}
    assert set(own.values()) <= set(layers), "a module is missing in the list of CONTRIBUTING.md"
    wrong = [
        f"{path.relative_to(package)} imports {name}"
        for path, layer in own.items()
        for name in _imported(path)
        if name in layers and layers.index(name) > layers.index(layer)
    ]
    assert not wrong


# Versions


def _pins() -> dict[str, Requirement]:
    """Name -> pin of constraints.txt, for this Python and this platform."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]
    assert all(str(pin.specifier).startswith("==") and not pin.url for pin in pins)
    return {canonicalize_name(pin.name): pin for pin in pins if not pin.marker or pin.marker.evaluate()}


def _requirements(name: str, extras: frozenset[str]) -> list[Requirement]:
    """What an installed package, with some of its extras, requires here."""
    found = [Requirement(text) for text in metadata.requires(name) or []]
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras | {""})]


def test_constraints_pin_what_is_installed():
    pins = _pins()
    seen: set[tuple[str, frozenset[str]]] = set()
    wrong = []
    todo = [("tokenformer", frozenset({"test"}))]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed")
            continue
        if name != "tokenformer" and name not in pins:
            wrong.append(f"{name} {version} is not in constraints.txt")
        elif name != "tokenformer" and not pins[name].specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version} is installed, constraints.txt has {pins[name].specifier}")
        todo += [(canonicalize_name(r.name), frozenset(r.extras)) for r in _requirements(name, extras)]
    assert len({name for name, _ in seen}) > 20
    assert not wrong, "install with `--constraint constraints.txt`, or pin anew as its header says:\n" + "\n".join(
        sorted(wrong)
    )


def test_constraints_pin_every_extra():
    required = _requirements("tokenformer", frozenset({"test", "lint", "docs"}))
    missing = {canonicalize_name(r.name) for r in required} - set(_pins()) - {"tokenformer"}  # an extra of our own
    assert not missing


# Commands in documents


def _commands(document: Path) -> Iterator[list[str]]:
    """The commands in the ```bash blocks of a Markdown file, one list of words each."""
    for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("();<>|&"):
                    if words:
                        yield words
                    words = []
                elif words or not re.fullmatch(r"\w+=.*", word):  # FOO=1 before a command
                    words.append(word)


def _wrong_make(arguments: list[str]) -> str:
    targets = re.findall(r"^([a-z]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return next((f"no target {a}" for a in arguments if "=" not in a and a not in targets), "")


def _wrong_tokenformer(arguments: list[str]) -> str:
    if not arguments or arguments[0] in ("--help", "--version"):
        return ""
    verb, *rest = arguments
    if verb not in cli.VERBS:
        return f"no verb {verb}"
    # `data prepare` has options of its own; for a verb without such words the second help is the first or an error.
    shown = _help(verb)[1] + (_help(verb, rest[0])[1] if rest and not rest[0].startswith("-") else "")
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w.-]*", shown))
    for option in (word.split("=")[0] for word in rest if re.match(r"--?[a-zA-Z]", word)):
        if option not in known and not any(option.startswith(f"{name}.") for name in known):
            return f"no option {option}"
    return ""


def _wrong_path(words: list[str]) -> str:
    shipped = (word for word in words if re.match(r"(?:recipes|examples|scripts)/", word))
    return next((f"no file {word}" for word in shipped if not (ROOT / word).exists()), "")


DOCUMENTS = sorted({ROOT / "README.md", *_tracked("*.md")})


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_documents_exist(document):
    check = {"make": _wrong_make, "tokenformer": _wrong_tokenformer}
    wrong = []
    for words in _commands(document):
        program = words[0].removeprefix(".venv/bin/")
        message = check[program](words[1:]) if program in check else ""
        if message := message or _wrong_path(words):
            wrong.append(f"{' '.join(words)}: {message}")
    assert not wrong


def test_readme_shows_commands():
    programs = {words[0] for words in _commands(ROOT / "README.md")}
    assert {"make", "tokenformer"} <= programs


# The test session itself


def test_uninitialised_memory_is_poisoned():
    assert torch.empty(3).isnan().all()
    assert torch.nn.Linear(2, 2, device="meta").to_empty(device="cpu").weight.isnan().all()
