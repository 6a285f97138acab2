import ast
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # vqvae.py, prior.py and the scripts, from wherever pytest is called

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


# -- for courses --------------------------------------------------------------------------------


def unwritten(path):
    """Functions of a module whose bodies were deleted, each with what its docstring, or that of its
    class, says."""
    def find(node, owner, about):
        for child in node.body:
            if isinstance(child, ast.ClassDef):
                yield from find(child, f"{child.name}.", ast.get_docstring(child))
            elif isinstance(child, ast.FunctionDef):
                rest = child.body[bool(ast.get_docstring(child)):]
                if all(isinstance(line, ast.Pass) or isinstance(line, ast.Expr) and isinstance(
                        line.value, ast.Constant) for line in rest):
                    said = (ast.get_docstring(child) or about or "").partition("\n\n")[0]
                    yield f"{owner}{child.name}", f"line {child.lineno}: {' '.join(said.split())}"
    return dict(find(ast.parse(path.read_text()), "", None))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure in a function that is still to be written shows as an error about None, far from
    its cause: say which function that is."""
    report = yield
    if report.failed:
        lines = [f"{path.name}: {name}, {said}" for path in sorted(ROOT.glob("*.py"))
                 for name, said in unwritten(path).items()]
        if lines:
            report.sections.append(("not written yet", "\n".join(lines)))
    return report
