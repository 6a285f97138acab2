"""README is kept true: its snippets run, and its map points at things that exist."""

import re
from pathlib import Path

import nbformat
import torch

import prior
import vqvae

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TESTS = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
SECTIONS = [line[3:] for cell in nbformat.read(ROOT / "tutorial.ipynb", as_version=4).cells
            if cell.cell_type == "markdown" for line in cell.source.splitlines()
            if line.startswith("## ")]


def table(heading):
    """The rows of the first table below a heading, as lists of cells."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_snippets_print_what_their_comments_say():
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert snippets, "README has no snippet left"
    for code in snippets:
        said = [line.split("#")[1].strip() for line in code.splitlines()
                if line.startswith("print")]
        printed = []
        exec(code, {"print": lambda value: printed.append(str(value)), "torch": torch})
        assert printed == said


def test_the_paper_map_points_at_code_tests_and_notebook_sections_that_exist():
    rows = table("From the paper to the code")
    assert len(rows) >= 7
    for paper, code, tests, sections in rows:
        owner = ""
        for name in re.findall(r"`([\w.]+)`", code):
            owner = owner if name.startswith(".") else name.split(".")[0]
            target = owner + name if name.startswith(".") else name
            found = None
            for module in (vqvae, prior):
                found = found or resolve(module, target)
            assert found, f"{paper}: there is no {target}"
        for name in re.findall(r"`([\w./]+)`", tests):
            exists = (ROOT / name).exists() if "/" in name else f"def {name}(" in TESTS
            assert exists, f"{paper}: there is no {name}"
        for section in sections.split("; "):
            assert section in SECTIONS, f"{paper}: the notebook has no section '{section}'"


def resolve(module, dotted):
    for part in dotted.split("."):
        module = getattr(module, part, None)
    return module


def test_pictures_of_the_readme_exist():
    for name in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / name).exists(), name

