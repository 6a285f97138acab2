"""README and the pages in .github are kept true: their snippets run, their map points at things
that exist, and every number that a run writes is explained."""

import importlib
import json
import re
import sys
import wave
from pathlib import Path

import nbformat
import pytest

import prior
import vqvae

ROOT = Path(__file__).parent.parent
README, DATA, RESULTS = ((ROOT / name).read_text() for name in (
    "README.md", ".github/DATA.md", ".github/RESULTS.md"))
TESTS = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
SECTIONS = [line[3:] for cell in nbformat.read(ROOT / "tutorial.ipynb", as_version=4).cells
            if cell.cell_type == "markdown" for line in cell.source.splitlines()
            if line.startswith("## ")]
SMALL = "--steps 2 --prior-steps 2 --hidden 8 --prior-channels 8 --device cpu".split()
RUNS = {"image": "--batch-size 8 --res-hidden 8 --demo-images 60 --size 16 --likelihood logistics "
                 "--second-stage --second-steps 2",
        "audio": "--batch-size 4 --clip 2048 --crop 512 --test-clips 2 --channels 4 "
                 "--skip-channels 4 --layers 3 --cycle 3 --demo-utterances 40",
        "video": "--batch-size 8 --res-hidden 8 --prior-batch-size 2 --prior-layers 1 "
                 "--demo-clips 10"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with runs/image, runs/audio and runs/video, as the demos leave them, only small."""
    folder = tmp_path_factory.mktemp("finished")
    for name, flags in RUNS.items():
        script = importlib.import_module(f"train_{name}")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", [f"train_{name}.py", *SMALL, *flags.split()])
            vqvae.launch(script.make_parser(), script.load_data, script.main, script.use)
    with wave.open(str(folder / "me.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(range(256)) * 100)
    return folder


def table(heading):
    """The rows of the first table below a heading, as lists of cells."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_snippets_print_what_their_comments_say(finished, monkeypatch):
    monkeypatch.chdir(finished)
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) >= 5, "README has lost snippets"
    printed = []
    for code in snippets:
        said = [line.split("#")[1].strip() for line in code.splitlines()
                if line.startswith("print")]
        printed.clear()
        exec(code, {"print": lambda value: printed.append(str(value))})        # each on its own
        assert printed == said


@pytest.mark.parametrize("name", RUNS)
def test_every_number_a_run_writes_is_explained(name, finished):
    found = json.loads((finished / "runs" / name / "metrics.json").read_text())
    explained = set(re.findall(r"`(\w+)`", DATA))
    plain = {key.removeprefix("valid_").removeprefix("unseen_") for key in found}
    assert not plain - explained, f".github/DATA.md does not explain {plain - explained}"


def test_every_number_that_is_explained_is_written(finished):
    rows = re.findall(r"^\| (`[^|]*`) \|", DATA, re.M)
    explained = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    written = {key for name in RUNS for key in json.loads(
        (finished / "runs" / name / "metrics.json").read_text())}
    assert not explained - written, f"no run writes {explained - written}"


def test_commands_name_flags_that_exist():
    for page in (README, DATA, RESULTS):
        for name, flags in re.findall(r"python train_(\w+)\.py([^`#\n]*)", page):
            parser = importlib.import_module(f"train_{name}").make_parser()
            known = {flag for action in parser._actions for flag in action.option_strings}
            for flag in re.findall(r"--[\w-]+", flags):
                assert flag in known, f"train_{name}.py has no {flag}"


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


@pytest.mark.parametrize("page", ["README.md", *(f".github/{name}.md" for name in (
    "DATA", "RESULTS", "COURSES", "CONTRIBUTING"))])
def test_links_and_pictures_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", text):
        if "://" not in name:
            assert ((ROOT / page).parent / name).exists(), f"{page}: {name}"
    for name in re.findall(r"\]\(#([\w-]+)\)", text):
        titles = [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-")
                  for t in re.findall(r"^#+ (.*)$", text, re.M)]
        assert name in titles, f"{page} has no section #{name}"


def test_readme_is_short():
    assert len(README.encode()) <= 13_000, "what is in RESULTS.md or DATA.md need not be here"
