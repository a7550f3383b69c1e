"""The documentation refers only to existing commands, options, files, links and errors."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from vllm_power.options import PowerOptions
from vllm_power.pattern import POWER
from vllm_power.tools.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
FOLDERS = ("vllm_power", "kernels", "tests", "deploy", "docker", "docs", ".ci")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.M))

FENCE = re.compile(r"^```.*?\n(.*?)^```", flags=re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of every use of `program` in the fenced and inline code of a page."""
    code = "\n".join(FENCE.findall(text) + INLINE_CODE.findall(FENCE.sub("", text)))
    code = code.replace("\\\n", " ")
    lines = re.findall(rf"^\s*(?:\$ |\S*/)?{re.escape(program)} +([^\n#]+)", code, flags=re.M)
    return [shlex.split(line) for line in lines]


@pages
def test_make_targets_exist(page):
    for words in commands(page.read_text(), "make"):
        targets = [word for word in words if "=" not in word and not word.startswith("-")]
        assert set(targets) <= TARGETS, f"make {' '.join(words)}"


def unknown(words: list[str]) -> list[str]:
    """The subcommands and options of a `vllm-power` command line that do not exist."""
    command = typer.main.get_command(app)
    found = []
    for word in words:
        context = typer.Context(command, **command.context_settings)
        if word == "--" or context.ignore_unknown_options:
            break  # the rest goes to another program
        if word.startswith("--"):
            parameters = command.get_params(context)
            options = {name for parameter in parameters for name in parameter.opts + parameter.secondary_opts}
            if word.partition("=")[0] not in options:
                found.append(word)
        elif hasattr(command, "commands"):
            if word not in command.commands:
                return [*found, word]
            command = command.commands[word]
    return found


@pages
def test_commands_and_their_options_exist(page):
    for words in commands(page.read_text(), "vllm-power"):
        assert not unknown(words), f"vllm-power {' '.join(words)}"


@pytest.mark.parametrize(
    "line, found",
    [
        ("bench cpu --seconds 2", []),
        ("bench kernels --no-million --folder=x", []),
        ("--help", []),
        ("bench --help", []),
        ("eval --serve MODEL -- --max-model-len 32768", []),
        ("pattern power --tokens 4096", []),
        ("bench gpu --seconds 2", ["gpu"]),
        ("bench cpu --anything --seconds=2", ["--anything"]),
        ("--anything demo", ["--anything"]),
    ],
)
def test_what_there_is_not_is_found(line, found):
    assert unknown(line.split()) == found


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_relative_links_resolve(page):
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        if not re.match(r"[a-z]+:", link):
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pages
def test_named_paths_exist(page):
    for code in INLINE_CODE.findall(FENCE.sub("", page.read_text())):
        if re.fullmatch(r"[\w./-]+", code) and code.startswith(tuple(f"{folder}/" for folder in FOLDERS)):
            assert (ROOT / code).exists(), code


def test_the_hooks_of_the_architecture_page_are_where_it_says():
    page = (ROOT / "docs" / "architecture.md").read_text()
    hooks = re.findall(r"^\| `\w+\.(\w+)` \| [\w ]+ \| `([\w/.]+)`", page, flags=re.M)
    assert len(hooks) >= 10
    for method, file in hooks:
        assert f"def {method}(" in (ROOT / file).read_text(), f"{method} in {file}"


def fixed_words(node: ast.expr) -> list[str]:
    """The constant parts of a message in the code."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr():
            return [piece for value in node.values for piece in fixed_words(value)]
        case ast.BinOp():
            return fixed_words(node.left) + fixed_words(node.right)
        case ast.IfExp():
            return fixed_words(node.body) + fixed_words(node.orelse)
    return []


def messages(module: str) -> Iterator[list[str]]:
    """Every error that a module raises or refuses with, as its constant parts."""
    for node in ast.walk(ast.parse((ROOT / "vllm_power" / f"{module}.py").read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        refuses = isinstance(call, ast.Call) and getattr(call.func, "id", "") == "_refuse"
        if isinstance(call, ast.Call) and call.args and (isinstance(node, ast.Raise) or refuses):
            yield fixed_words(call.args[0])


@pytest.mark.parametrize("module", ["plugin", "options", "pattern", "refusals", "gpu_backend"])
def test_every_error_of_the_engines_path_is_in_the_docs(module):
    """Compared by the longest constant part of the first sentence."""
    page = " ".join((ROOT / "docs" / "errors.md").read_text().split())
    found = list(messages(module))
    assert found
    for pieces in found:
        longest = max((piece.split(". ")[0].strip(" .;:,(") for piece in pieces), key=len, default="")
        assert longest in page, longest


def test_the_page_of_options_has_every_option_and_its_default():
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| (.+) \|$", (ROOT / "docs" / "options.md").read_text(), flags=re.M
    )
    expected = {}
    for name, field in PowerOptions.model_fields.items():
        default = field.get_default(call_default_factory=True)
        default = getattr(POWER, name) if default is None else default
        expected[name] = "none" if default == [] else str(default).lower()
    assert {name: default.strip("`") for name, default in rows} == expected


@pytest.mark.parametrize(
    "text, program, found",
    [
        ("```sh\nmake demo\n```", "make", [["demo"]]),
        ("```\n$ make test PYTHON=python3.12  # all\n```", "make", [["test", "PYTHON=python3.12"]]),
        ("run `vllm-power bench cpu` now", "vllm-power", [["bench", "cpu"]]),
        ("```\n.venv/bin/vllm-power demo\n```", "vllm-power", [["demo"]]),
        ("```\nvllm-power demo \\\n  --tokens 64\n```", "vllm-power", [["demo", "--tokens", "64"]]),
        ("make sure that prose is left alone", "make", []),
    ],
)
def test_commands_are_found(text, program, found):
    assert commands(text, program) == found
