"""The Python example of docs/inference.md runs as it is written."""

import re
from pathlib import Path


def test_the_example_of_the_documentation_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/inference.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, "docs/inference.md", "exec"), names)
    assert names["frames"].shape == (1, 33, 48, 48, 3)
    assert capsys.readouterr().out.count("torch.Size") == 3
