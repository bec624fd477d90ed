"""The Python examples of the documentation run as they are written."""

import re
from pathlib import Path

import pytest


@pytest.mark.parametrize(("document", "printed"), [("README.md", 0), ("docs/inference.md", 3)])
def test_the_example_of_the_documentation_runs(document, printed, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", Path(document).read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, document, "exec"), names)
    assert names["frames"].shape == (1, 33, 48, 48, 3)
    assert capsys.readouterr().out.count("torch.Size") == printed
