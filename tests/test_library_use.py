"""handmill as a library: the example in the README runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.library import models_folder

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_examples_of_the_readme_run(starter_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models_folder().mkdir(parents=True)
    (models_folder() / starter_model.name).symlink_to(starter_model)
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip()


def test_importing_it_loads_nothing_heavy() -> None:
    heavy = "llama_cpp", "numpy", "jinja2", "prompt_toolkit", "huggingface_hub", "tokenizers", "matplotlib"
    script = f"import sys, runner; runner.load; print(sorted(set(sys.modules) & set({heavy!r})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
