"""What the README and the pages name exists: options, methods, paths, links, names of the package and exit codes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import site_hooks

import deltafmt
from deltafmt.errors import DeltafmtError

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

every_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").split("\nnav:\n")[1]
    listed = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES[1:])


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def slug(heading: str) -> str:
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip())


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(path.read_text("utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), target


def test_pages_that_code_names_exist() -> None:
    for folder in ("deltafmt", "kernels", "tools", "examples", "benchmarks", "tests", "fuzz", "spec"):
        for file in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"docs/[\w/-]+\.(?:md|py)", file.read_text("utf-8")):
                assert (ROOT / name).exists(), f"{file}: {name}"


# Made by a run, and the files that a guide tells readers to write.
NOT_THERE = ("benchmarks/results", "benchmarks/results/", "tools/count_cmd.py", "tests/test_count.py")


@every_page
def test_paths_exist(page: Path) -> None:
    """A path in code, such as ``deltafmt/terms/``, is one of the repository; names in capitals stand for any."""
    text = page.read_text("utf-8")
    for name in re.findall(r"`((?:deltafmt|kernels|tools|tests|docs|examples|benchmarks|spec|fuzz)/[\w./-]*)`", text):
        if name not in NOT_THERE and not any(part.isupper() for part in re.split(r"[./_]", name)):
            assert (ROOT / name).exists(), name


def test_the_staircase_is_the_one_that_is_checked() -> None:
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    drawn = re.findall(r'class="layer">([^<]*)<', (DOCS / "staircase.svg").read_text("utf-8"))
    assert drawn == next(rule["layers"] for rule in rules if rule["type"] == "layers")


OF_VLLM = {
    "--additional-config",
    "--enable-lora",
    "--enable-prompt-embeds",
    "--enable-sleep-mode",
    "--enforce-eager",
    "--load-format",
    "--lora-modules",
    "--lora-target-modules",
    "--max-cpu-loras",
    "--max-lora-rank",
    "--max-loras",
    "--model",
    "--runner",
}


def known_options() -> set[str]:
    found = {"--help", "--version", "--verbose"}
    for command in site_hooks.commands():
        parser = site_hooks.parser_of(command)
        if parser.rare is not None:
            parser.rare(parser)
        for action in parser._actions:
            found.update(action.option_strings)
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        found.update(re.findall(r'"(--[a-z][a-z-]*)"', benchmark.read_text("utf-8")))
    found.update(("--finetuned", "--eval"))  # accuracy.py makes them from a list of names
    return found | OF_VLLM


@every_page
def test_options_exist(page: Path) -> None:
    known = known_options()
    text = page.read_text("utf-8")
    for line in re.findall(r"`(deltafmt [^`\n]*|--[a-z][^`\n]*)`|^(?:\$ )?(deltafmt .*|    --.*)$", text, re.MULTILINE):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", "".join(line)):
            assert option in known, option


def test_the_methods_named_exist() -> None:
    spelled = r"(?:--method |--candidate |--rule \S+ |`)(({})(?::[\w.=:,@+-]+)?)(?=[\s`])".format(
        "|".join(deltafmt.methods.METHODS)
    )
    found = {name for page in PAGES for name, _ in re.findall(spelled, page.read_text("utf-8"))}
    assert len(found) > len(deltafmt.methods.METHODS)
    for text in found:
        deltafmt.methods.parse(text)


def test_exit_codes() -> None:
    page = (DOCS / "exit-codes.md").read_text("utf-8")
    listed = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)}

    def classes(root: type[DeltafmtError]) -> list[type[DeltafmtError]]:
        return [root, *(each for child in root.__subclasses__() for each in classes(child))]

    assert listed == {
        each.__name__: each.exit_code for each in classes(DeltafmtError) if each.__module__ == "deltafmt.errors"
    }


def test_the_python_page_has_every_public_name() -> None:
    page = (DOCS / "python.md").read_text("utf-8")
    documented = set(re.findall(r"^::: deltafmt\.(?:[\w.]+\.)?(\w+)$", page, re.MULTILINE))
    public = {name for name in deltafmt.__all__ if not name.startswith("_")}
    assert public - documented <= {"open"}  # open is DeltaFile
    assert {method.__name__ for method in deltafmt.methods.METHODS.values()} <= documented


def test_made_parts_of_pages() -> None:
    for page in PAGES:
        for name in re.findall(r"<!-- made: (.*?) -->", page.read_text("utf-8")):
            assert len(site_hooks.MADE[name]()) > 1000
