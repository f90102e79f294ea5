"""What the project says of itself agrees: dependencies, licence, version, and what the Markdown files link to and run."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # where the import's name is another one
OPTIONAL = {"bitsandbytes", "img2dataset", "deepspeed"}  # imported for one option only, which says what to install


def tracked(pattern: str) -> list[Path]:
    """The files that git knows or would add."""
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern], cwd=ROOT,
                             capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in sorted(set(listing.stdout.splitlines())) if (ROOT / name).is_file()]


def requirement_lines(path: str) -> list[str]:
    lines = [line.split(" #")[0].strip() for line in (ROOT / path).read_text("utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# --- dependencies ---------------------------------------------------------------------------------------------------


def test_requirements_repeat_pyproject():
    extras = PROJECT["optional-dependencies"]
    assert requirement_lines("requirements.txt") == PROJECT["dependencies"] + extras["dev"]
    assert requirement_lines("v3/requirements.txt") == ["-r ../requirements.txt", *extras["v3"]]


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_import_is_declared():
    scripts = tracked("*.py")
    own = {path.stem for path in scripts} | {path.parent.name for path in scripts}
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for lines in lists for line in lines}
    missing = {}
    for path in scripts:
        for name in imported(path) - set(sys.stdlib_module_names) - own - OPTIONAL:
            if DISTRIBUTIONS.get(name, name).lower() not in declared:
                missing.setdefault(name, path.name)
    assert not missing


# --- licence and citation -------------------------------------------------------------------------------------------


def test_citation_project_and_licence_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["authors"] == PROJECT["authors"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "MIT"
    for name in PROJECT["license-files"]:
        assert (ROOT / name).read_text("utf-8").startswith("MIT License")


# --- the Markdown files ---------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def anchors(path: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_pictures_exist():
    broken = []
    for page in tracked("*.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if re.match(r"\w+:", link):  # another site's
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or anchor and anchor not in anchors(target):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def test_the_readme_names_every_script():
    block = (ROOT / "README.md").read_text("utf-8").split("## Files\n")[1].split("\n## ")[0]
    lists = re.findall(r"^    ((?:[\w./]+\.py,? )+)", block, re.M)
    named = {name for names in lists for name in re.findall(r"[\w./]+\.py", names)}
    scripts = {path.relative_to(ROOT).as_posix() for path in tracked("*.py")}
    wanted = {name for name in scripts if not name.endswith("__init__.py") and not name.startswith("tests/")}
    assert named - {"tests/kill_runs.py"} == wanted


def class_options(tree: ast.Module, name: str) -> set[str]:
    """The options that `common.settings.parse` makes of a settings class, its base classes included."""
    options = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ClassDef) and node.name == name):
            continue
        for base in node.bases:
            for path in tracked("common/*.py"):
                options |= class_options(ast.parse(path.read_text("utf-8")), ast.unparse(base).split(".")[-1])
            options |= class_options(tree, ast.unparse(base))
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                option = field.target.id.replace("_", "-")
                options.add(f"--{option}")
                if ast.unparse(field.annotation) == "bool":
                    options.add(f"--no-{option}")
    return options


def options_of(script: Path) -> set[str]:
    source = script.read_text("utf-8")
    by_hand = set(re.findall(r"add_argument\(\s*[\"'](--[\w-]+)", source))
    return class_options(ast.parse(source), "Settings") | by_hand | {"--help"}


def snippets(page: Path) -> list[str]:
    """The lines of a page's code blocks, without comments, and its inline code, whose line breaks are spaces."""
    text = page.read_text("utf-8")
    block_line = re.compile(r"^    (.*)$", re.M)
    blocks = [line.split("  #")[0] for line in block_line.findall(text)]
    inline = re.findall(r"`([^`]+)`", block_line.sub("", text))
    return blocks + [" ".join(code.split()) for code in inline]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(script, arguments) of everything that a page runs with python or accelerate."""
    found = []
    for snippet in snippets(page):
        for part in re.split(r"&&|;|\|", snippet):
            if not re.match(r"\s*(\w+=\S+ )*(python|accelerate launch) ", part):
                continue
            words = shlex.split(part)
            module = re.search(r"-m ((?:common|data)(?:\.\w+)+)", part)
            if module:
                found.append((module[1].replace(".", "/") + ".py", words[words.index(module[1]) + 1 :]))
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if scripts:  # of several, the first one runs the last one
                found += [(words[i], []) for i in scripts[:-1]] + [(words[scripts[-1]], words[scripts[-1] + 1 :])]
    return found


def test_commands_name_files_and_options_that_exist():
    wrong, seen = [], 0
    for page in tracked("*.md"):
        for script, arguments in commands(page):
            seen += 1
            if not (ROOT / script).is_file():
                wrong.append(f"{page.relative_to(ROOT)}: {script}")
                continue
            known = options_of(ROOT / script)
            given = {word.split("=")[0] for word in arguments if word.startswith("--")}
            wrong += [f"{page.relative_to(ROOT)}: {script} {option}" for option in sorted(given - known)]
    assert seen > 30
    assert not wrong
